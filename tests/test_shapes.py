"""The built-in model says what is in the picture, exported, at every precision.

Random weights can't show that: a precision is right when the answers stay right. How right, on
hundreds of scenes, is held by tests/evaluation/test_evaluate.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import vlmport
from vlmport.bundle import SUFFIXES, Bundle

ROOT = Path(__file__).parents[1]
EXAMPLES = json.loads((ROOT / "examples/captions.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def shapes(built_in: Callable[[str], Bundle]) -> Bundle:
    return built_in("shapes")


@pytest.mark.parametrize("precision", ["auto", *SUFFIXES])
def test_the_examples_are_captioned_right(precision: str, shapes: Bundle) -> None:
    pictures = [ROOT / "examples" / name for name in EXAMPLES]
    with vlmport.load(shapes.folder, precision=precision) as model:
        assert [str(one) for one in model.caption(pictures)] == list(EXAMPLES.values())
        assert "".join(model.stream(pictures[0])) == next(iter(EXAMPLES.values()))
