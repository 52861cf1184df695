"""The built-in model is trained: on it the limits for rounded weights mean something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.parity import breaks
from tests.parity.conftest import Case, assert_first_broken, case, failing, value
from tests.parity.surgery import copied, edit_graph
from vlmport.builtin import builtin_models
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.parity import verify
from vlmport.parity.pictures import named_pictures
from vlmport.runtime.decoding.search import StopCondition

SHAPES = builtin_models()["shapes"]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def shapes(built_in: Callable[[str], Bundle]) -> Case:
    """One of its captions, which ends with a stop token."""
    bundle = built_in("shapes")
    (picture,) = named_pictures([EXAMPLES / "red_circle_orange_star_blue_star.png"])
    return case(SHAPES, bundle, picture)


@pytest.fixture
def broken(shapes: Case, tmp_path: Path) -> Bundle:
    return copied(shapes.bundle, tmp_path / "broken")


def test_green_in_every_precision(shapes: Case) -> None:
    pictures = [EXAMPLES / "red_square.png", EXAMPLES / "green_triangle_purple_circle.png"]
    report = verify(shapes.bundle, SHAPES, images=pictures)
    assert report.passed, report.summary
    assert {row.precision for row in report.rows} == set(SUFFIXES)


def test_it_says_enough_to_be_wrong(shapes: Case) -> None:
    made = shapes.truth.made.tokens
    assert len(made) > 8
    assert made[-1] in shapes.reference.stop_token_ids


@pytest.mark.parametrize(("rung", "damage"), breaks.BUNDLE, ids=lambda x: getattr(x, "__name__", x))
def test_broken_bundle(shapes: Case, broken: Bundle, rung: str, damage) -> None:
    assert_first_broken(shapes.climb(damage(broken, "q4"), "q4"), rung)


@pytest.mark.parametrize(
    ("rung", "damage"), breaks.RUNTIME, ids=lambda x: getattr(x, "__name__", x)
)
def test_broken_runtime(shapes: Case, monkeypatch: pytest.MonkeyPatch, rung: str, damage) -> None:
    damage(monkeypatch, len(shapes.truth.prompt_ids))
    assert_first_broken(shapes.climb(shapes.bundle, "q4"), rung)


def sixteenths(model: onnx.ModelProto) -> None:
    """Keep the high half of every 8-bit weight."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight_quantized"):
            whole = numpy_helper.to_array(tensor)
            zero, kind = (0, np.int8) if whole.dtype == np.int8 else (128, np.uint8)
            steps = np.clip(np.round((whole.astype(np.int32) - zero) / 16), -8, 7)
            rounded = (steps * 16 + zero).astype(kind)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))


@pytest.mark.parametrize("precision", ["q8", "q4", "q4f16"])
def test_a_four_bit_tower(shapes: Case, broken: Bundle, precision: str) -> None:
    """The tower has 8 bits in each of them."""
    report = shapes.climb(edit_graph(broken, breaks.VISION, sixteenths, precision), precision)
    assert_first_broken(report, "vision_features")
    assert value(shapes.climb(shapes.bundle, precision), "vision_features", "typical") < 0.02


def test_a_four_bit_embedding_in_q8(shapes: Case, broken: Bundle) -> None:
    report = shapes.climb(edit_graph(broken, breaks.EMBED, sixteenths, "q8"), "q8")
    assert_first_broken(report, "merged_embeds")


# Where a text ends


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_a_stop_id_too_many(shapes: Case, broken: Bundle, precision: str) -> None:
    """In the middle of the caption: by the manifest and by what it does to the text."""
    token = int(shapes.truth.made.tokens[4])
    report = shapes.climb(breaks.stops_early(broken, precision, token), precision)
    assert_first_broken(report, "greedy_tokens")
    if precision == "q4":
        assert failing(report, "greedy_tokens") == {"stop ids", "regret"}
        assert failing(report, "end_to_end") == {"regret"}


def test_a_runtime_that_never_stops(shapes: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(ending: StopCondition, tokens: tuple[int, ...]) -> str | None:
        return "length" if len(tokens) >= ending.max_new_tokens else None

    monkeypatch.setattr(StopCondition, "reason", full)
    report = shapes.climb(shapes.bundle, "q4")
    assert_first_broken(report, "greedy_tokens")
    assert failing(report, "greedy_tokens") == {"regret"}


def test_a_runtime_that_stops_too_soon(shapes: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(ending: StopCondition, tokens: tuple[int, ...]) -> str | None:
        return "length" if len(tokens) >= 5 else None

    monkeypatch.setattr(StopCondition, "reason", full)
    report = shapes.climb(shapes.bundle, "q4")
    assert_first_broken(report, "greedy_tokens")
    assert 1 < value(report, "greedy_tokens", "regret") < float("inf")
