"""Packages for some tests that can't be installed next to the others: a folder for PYTHONPATH."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


def overlay(name: str, run_folder: Path) -> Path:
    """A folder with what requirements-NAME.txt lists; installed where it is older than that.

    Args:
        run_folder: a folder that all workers of this run share.
    """
    folder, requirements = ROOT / f".venv-{name}", ROOT / f"requirements-{name}.txt"
    done = folder / "installed"
    with FileLock(run_folder / f"{name}.lock"):
        if not done.exists() or done.stat().st_mtime < requirements.stat().st_mtime:
            command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
            command += ["--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
            command += ["--requirement", str(requirements)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                pytest.fail(f"{requirements.name} can't be installed:\n{run.stderr}")
            done.touch()
    return folder
