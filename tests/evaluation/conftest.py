"""The built-in model in every precision, and pictures with captions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vlmport
from vlmport.bundle import SUFFIXES

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in every precision, not to be changed."""
    out = tmp_path_factory.mktemp("shapes") / "shapes"
    return vlmport.export("shapes", out, precisions=tuple(SUFFIXES)).folder


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "own"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The examples, with their captions."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "my | <pictures>"))
