"""Each rounded weight is the rounding of the one in fp32, and a wrong one is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.parity.breaks import DECODER, EMBED, VISION, scaled
from tests.parity.surgery import copied, edit_tensor
from vlmport.builtin import builtin_models
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.bundle.layouts import COMPONENTS
from vlmport.exporter import export
from vlmport.graph.parameters import (
    INT4,
    INT4_FLOAT16,
    INT8,
    INT8_FLOAT16,
    Format,
    quantize_blocks,
    quantize_columns,
)
from vlmport.parity import verify
from vlmport.parity.limits import WEIGHTS
from vlmport.parity.report import Row
from vlmport.parity.rounding import rounding_error, weight_rows
from vlmport.parity.rungs import CAUSES

ROUNDED = [precision for precision in SUFFIXES if precision != "fp32"]
SHAPES = builtin_models()["shapes"]


@pytest.fixture(scope="module")
def shapes(built_in: Callable[[str], Bundle]) -> Bundle:
    return built_in("shapes")


@pytest.fixture
def broken(shapes: Bundle, tmp_path: Path) -> Bundle:
    return copied(shapes, tmp_path / "broken")


def failed(bundle: Bundle, precision: str) -> list[Row]:
    return [row for row in weight_rows(bundle, precision) if not row.passed]


@pytest.mark.parametrize("precision", ROUNDED)
def test_every_weight_of_every_component_is_compared(shapes: Bundle, precision: str) -> None:
    rows = list(weight_rows(shapes, precision))
    assert {row.image for row in rows} == {VISION, EMBED, DECODER}
    assert all(row.passed for row in rows), rows
    worst = max(one.value for row in rows for one in row.measures if one.name == "steps")
    assert worst == 0 if precision == "fp16" else 0.45 < worst <= 0.501


def test_fp32_is_held_against_pytorch_instead(shapes: Bundle) -> None:
    assert list(weight_rows(shapes, "fp32")) == []
    mixed = {row.image for row in weight_rows(shapes, "vision=fp32,decoder=q4,embed=q4")}
    assert mixed == {EMBED, DECODER}


@pytest.mark.parametrize("precision", ["q8", "q4", "q4f16"])
def test_one_matrix_scaled_by_a_tenth_is_found(precision: str, broken: Bundle) -> None:
    """What the captions don't show."""
    changed = scaled(broken, DECODER, "layers.1.mlp.down_proj.weight", 1.1, precision)
    (row,) = failed(changed, precision)
    assert row.image == DECODER
    assert row.detail is not None
    assert row.detail.endswith("layers.1.mlp.down_proj.weight'")


def test_verify_says_so_first(broken: Bundle) -> None:
    changed = scaled(broken, DECODER, "layers.0.self_attn.o_proj.weight", 1.1, "q4")
    report = verify(changed, SHAPES, precisions=["fp32", "q4"])
    assert not report.passed
    assert report.first_broken is not None
    assert report.first_broken.rung == "weights"
    assert report.likely_cause == CAUSES["weights"]


def test_a_scale_that_is_no_number_is_found(broken: Bundle) -> None:
    def spoil(scales: np.ndarray) -> np.ndarray:
        scales[3, 0] = np.nan
        return scales

    name = "layers.0.mlp.down_proj.weight_scales"
    (row,) = failed(edit_tensor(broken, DECODER, name, spoil, "q4"), "q4")
    assert [one.name for one in row.measures if not one.passed] == ["steps"]


def test_two_bytes_that_changed_places_are_found(broken: Bundle) -> None:
    def swap(packed: np.ndarray) -> np.ndarray:
        packed[3, 0, [2, 9]] = packed[3, 0, [9, 2]]
        return packed

    name = "layers.0.mlp.down_proj.weight_quantized"
    (row,) = failed(edit_tensor(broken, DECODER, name, swap, "q4"), "q4")
    assert [one.name for one in row.measures if not one.passed] == ["steps"]


def test_a_norm_that_is_kept_in_floats_is_compared_too(broken: Bundle) -> None:
    name = "layers.1.input_layernorm.weight"
    changed = edit_tensor(broken, DECODER, name, lambda x: np.nextafter(x, x + 1), "q4")
    (row,) = failed(changed, "q4")
    assert [one.name for one in row.measures if not one.passed] == ["unequal"]


@pytest.mark.parametrize("columns", [32, 40, 96])
def test_half_a_step_is_the_most_that_rounding_costs(columns: int) -> None:
    rng = np.random.default_rng(columns)
    matrix = rng.standard_normal((24, columns)).astype(np.float32)
    matrix[5] = 0
    for form in (INT4, INT8):
        quantized, scales = quantize_blocks(matrix, form)
        assert form.bits is not None
        right = rounding_error(quantized, scales, matrix.T, form.bits)
        assert 0.4 < right <= 0.501
        assert rounding_error(quantized, 1.1 * scales, matrix.T, form.bits) > 0.7
        other = matrix.copy()
        other[5, 0] = 1
        assert rounding_error(quantized, scales, other.T, form.bits) == np.inf
        assert rounding_error(quantized, scales, matrix[:, :-32].T, form.bits) == np.inf
    quantized, scales = quantize_columns(matrix)
    assert 0.4 < rounding_error(quantized, scales, matrix.T) <= 0.501
    assert rounding_error(quantized, 1.1 * scales, matrix.T) > 5
    assert WEIGHTS["steps"].bound < 0.7


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("form", [INT4_FLOAT16, INT8_FLOAT16])
def test_a_scale_in_float16_is_no_error_of_the_weights(form: Format, size: float) -> None:
    """Rounded, it may put the outermost weights past their levels: of 128 steps up to 0.06, and
    more where float16 has few bits left. A scale that is off by three hundredths is still found."""
    assert form.bits is not None
    matrix = size * np.random.default_rng(form.bits).standard_normal((512, 256)).astype(np.float32)
    matrix[:, 1::2] = -matrix[:, ::2]  # so that both ends of a block are as far
    quantized, stored = quantize_blocks(matrix, form)
    scales = stored.astype(np.float16)
    assert 0.4 < rounding_error(quantized, scales, matrix.T, form.bits) <= 0.501
    if size > 1e-3:
        wrong = (scales * np.float16(0.97)).astype(np.float16)
        assert rounding_error(quantized, wrong, matrix.T, form.bits) > 0.6


def test_the_pooling_heads_scores_are_compared(tmp_path: Path) -> None:
    """No weight of the checkpoint's own name, and compared all the same."""
    checkpoint = write_prefix_checkpoint(tmp_path / "checkpoint")
    bundle = export(checkpoint, tmp_path / "out", precisions="fp32,q8,q4f16", layout=COMPONENTS)
    assert not failed(bundle, "q8")
    assert not failed(bundle, "q4f16")
    edit_tensor(bundle, VISION, "attention.scores", lambda x: np.nextafter(x, x + 1), "q8")
    (row,) = failed(Bundle.open(bundle.folder), "q8")
    assert row.detail == "'vision_encoder.head.attention.scores'"
