"""Where the shared test data lies, for tests that also run on real files when they are there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shared_testdata(*parts: str) -> Path | None:
    """`../shared/testdata/<parts>` beside the repository, or None where it is absent."""
    path = ROOT.parent.joinpath("shared", "testdata", *parts)
    return path if path.exists() else None
