"""The built-in model that answers climbs the whole ladder: split and whole, one picture and two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle
from vlmport.parity import verify

CHECKPOINT = builtin_models()["shapes-smolvlm"]
EXAMPLES = Path(__file__).parents[2] / "examples"
PRECISIONS = ("fp32", "q4")  # `make verify-all` has the others


def test_green(built_in: Callable[[str], Bundle]) -> None:
    """All but q4 without a picture: no question was trained that way, and 4 bits then change the
    first token's odds by more than the limits allow."""
    pictures = [EXAMPLES / "red_square.png", EXAMPLES / "red_triangle_purple_circle.png"]
    bundle = built_in("shapes-smolvlm")
    report = verify(bundle, CHECKPOINT, images=pictures, precisions=PRECISIONS)
    broken = {(row.precision, row.image) for row in report.rows if not row.passed}
    assert broken <= {("q4", "text alone")}, report.summary
    assert {row.precision for row in report.rows} == set(PRECISIONS)
    asked = {row.image for row in report.rows if row.rung == "greedy_tokens"}
    assert {"red_square.png", "red_square.png whole", "two pictures", "two pictures split"} <= asked
