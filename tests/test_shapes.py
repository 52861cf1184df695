"""The built-in model says what is in the picture, exported, at every precision.

Random weights can't show that: a precision is right when the answers stay right.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlmport
from vlmport.builtin.scenes import caption, draw, held_out
from vlmport.bundle import SUFFIXES, Bundle

ROOT = Path(__file__).parents[1]
EXAMPLES = json.loads((ROOT / "examples/captions.json").read_text("utf-8"))
SCENES = 100


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("shapes") / "bundle"
    return vlmport.export("shapes", out, precisions=tuple(SUFFIXES))


@pytest.mark.parametrize("precision", ["auto", *SUFFIXES])
def test_the_examples_are_captioned_right(precision: str, shapes: Bundle) -> None:
    pictures = [ROOT / "examples" / name for name in EXAMPLES]
    with vlmport.load(shapes.folder, precision=precision) as model:
        assert [str(one) for one in model.caption(pictures)] == list(EXAMPLES.values())
        assert "".join(model.stream(pictures[0])) == next(iter(EXAMPLES.values()))


@pytest.mark.parametrize(("precision", "at_least"), [("fp32", 97), ("q8", 96), ("q4", 94)])
def test_held_out_scenes_are_captioned_right(precision: str, at_least: int, shapes: Bundle) -> None:
    """q8 may cost one scene in a hundred, q4 three."""
    scenes = held_out(SCENES)
    with vlmport.load(shapes.folder, precision=precision) as model:
        given = model.caption([draw(scene) for scene in scenes])
    right = sum(str(one) == caption(scene) for one, scene in zip(given, scenes, strict=True))
    assert right >= at_least
