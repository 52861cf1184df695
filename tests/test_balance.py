"""What is long is left out of `make test-fast`, and every room keeps something quick."""

from __future__ import annotations

import re
from pathlib import Path

from tests.balance import LONG, SPREAD

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}


def test_the_files_that_are_named_are_there() -> None:
    assert len(set(LONG)) == len(LONG)
    assert set(LONG) <= FILES
    assert set(SPREAD) <= FILES


def test_every_folder_has_quick_tests() -> None:
    folders = {name.rpartition("/")[0] for name in FILES if "node_modules" not in name}
    quick = {name.rpartition("/")[0] for name in FILES - set(LONG)}
    assert folders - quick == set()


def test_the_makefile_asks_for_both() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    (fast,) = re.findall(r"^test-fast:.*\n((?:\t.*\n)+)", text, flags=re.MULTILINE)
    assert '-m "not slow"' in fast
    assert "--dist loadfile" in fast
