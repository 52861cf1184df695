"""The built-in models of Qwen-VL's kinds climb the whole ladder: many grids, turns, text alone."""

from __future__ import annotations

import pytest

from tests.shapes_qwen import EXAMPLES, MODELS
from vlmport.builtin import builtin_models
from vlmport.exporter import export
from vlmport.parity import verify
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.rungs import WEIGHTS_RUNG

PRECISIONS = ("fp32", "fp16", "q8", "q4")


@pytest.mark.parametrize("name", MODELS)
def test_green_in_every_precision(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = builtin_models()[name]
    out = tmp_path_factory.mktemp(name) / "bundle"
    bundle = export(checkpoint, out, precisions=PRECISIONS)
    pictures = [EXAMPLES / "red_square.png", EXAMPLES / "red_triangle_purple_circle.png"]
    report = verify(bundle, checkpoint, images=pictures)
    assert report.passed, report.summary
    assert {row.precision for row in report.rows} == set(PRECISIONS)
    assert {row.rung for row in report.rows} == {WEIGHTS_RUNG, *HubLadder.names()}
    asked = {row.image for row in report.rows if row.rung == "greedy_tokens"}
    assert {"red_square.png", "two pictures, two turns", "text alone"} <= asked
