"""Each TypeScript module that is called the twin of a Python module names one that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "web/src"
TWIN = re.compile(r"\bvlmport/[\w/]+\.py\b")
# Rooms that both sides have: a module of one of them that has a namesake in Python names it.
ROOMS = ("bundle", "runtime", "text")

MODULES = sorted(SOURCE.rglob("*.ts"))


def named(module: Path) -> list[str]:
    """The Python modules that a TypeScript module names, comments' line breaks left out."""
    text = module.read_text(encoding="utf-8")
    return TWIN.findall(re.sub(r"\n\s*\* ?", " ", text))


@pytest.mark.parametrize("module", MODULES, ids=lambda one: one.relative_to(SOURCE).as_posix())
def test_the_python_modules_that_are_named_exist(module: Path) -> None:
    assert [one for one in named(module) if not (ROOT / "src" / one).is_file()] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda one: one.relative_to(SOURCE).as_posix())
def test_a_module_names_its_namesake(module: Path) -> None:
    path = module.relative_to(SOURCE).with_suffix(".py")
    twin = Path("vlmport", path.parent, path.name.replace("-", "_"))
    if path.parts[0] in ROOMS and (ROOT / "src" / twin).is_file():
        assert twin.as_posix() in named(module)


def test_there_are_twins() -> None:
    assert sum(bool(named(module)) for module in MODULES) > 15
