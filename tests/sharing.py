"""What one worker of a run makes and all of them read: bundles and pages that cost seconds.

pytest-xdist has a process for each core, and each has session fixtures of its own. Here the first
that asks makes a folder, the others wait for it and read it. Nobody may change what is in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole run, above those of its workers."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once in a run; it gets the folder's path and makes it itself.

    Where it fails, the next that asks tries again.
    """
    folder = run_folder(factory) / "shared" / name
    done = folder.with_name(f"{folder.name}.done")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            make(folder)
            done.touch()
    return folder
