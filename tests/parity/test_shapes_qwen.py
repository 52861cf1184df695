"""The built-in models of Qwen-VL's kinds climb the whole ladder: many grids, turns, text alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.shapes_qwen import EXAMPLES, MODELS
from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle
from vlmport.parity import verify
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.rungs import WEIGHTS_RUNG

PRECISIONS = ("fp32", "q4")  # `make verify-all` has the others


@pytest.mark.parametrize("name", MODELS)
def test_green(name: str, built_in: Callable[[str], Bundle]) -> None:
    checkpoint, bundle = builtin_models()[name], built_in(name)
    pictures = [EXAMPLES / "red_square.png", EXAMPLES / "red_triangle_purple_circle.png"]
    report = verify(bundle, checkpoint, images=pictures, precisions=PRECISIONS)
    assert report.passed, report.summary
    assert {row.precision for row in report.rows} == set(PRECISIONS)
    assert {row.rung for row in report.rows} == {WEIGHTS_RUNG, *HubLadder.names()}
    asked = {row.image for row in report.rows if row.rung == "greedy_tokens"}
    assert {"red_square.png", "two pictures, two turns", "text alone"} <= asked
