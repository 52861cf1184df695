"""The built-in model in every precision, and pictures with captions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmport.bundle import Bundle

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def shapes(built_in: Callable[[str], Bundle]) -> Path:
    """The built-in model in every precision, not to be changed."""
    return built_in("shapes").folder


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "own"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The examples, with their captions."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "my | <pictures>"))
