"""Compare each rounded weight with the one that fp32 computes with.

The ladder shows an error of a rounded bundle only where it costs more than the rounding itself: one
decoder matrix of many that is scaled by 1.1 does not. So the weights are compared too, one by one,
in the files: the ladder compares fp32 with PyTorch, and this module every other precision with
fp32. It reads the files without the exporter's code, whose errors it would share.

K inputs, N outputs of a matrix, or rows and width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlmport.bundle import ANY, Bundle
from vlmport.errors import some_names
from vlmport.parity import metrics
from vlmport.parity.limits import WEIGHTS
from vlmport.parity.report import Measure, Row
from vlmport.parity.rungs import WEIGHTS_RUNG

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

FP32 = "fp32"
QUANTIZED, SCALES = "_quantized", "_scales"
TINY = np.finfo(np.float32).tiny


def weight_rows(bundle: Bundle, precision: str) -> Iterator[Row]:
    """Make a row for each component at a precision that is not fp32, where fp32 is there."""
    for component, chosen in bundle.manifest.choose(precision).items():
        if chosen in (FP32, ANY) or FP32 not in bundle.manifest.components[component]:
            continue
        exact = _weights(bundle, component, FP32)
        values, detail = _compare(_weights(bundle, component, chosen), exact)
        measures = tuple(Measure(name, values[name], limit) for name, limit in WEIGHTS.items())
        yield Row(component, precision, WEIGHTS_RUNG, measures, detail=detail)


def _weights(bundle: Bundle, component: str, precision: str) -> dict[str, ir.Value]:
    """Find the initializers that are made from the checkpoint; none is read yet."""
    graph = ir.load(bundle.path(bundle.variant(component, precision).model)).graph
    return {name: value for name, value in graph.initializers.items() if _is_weight(name)}


def _is_weight(name: str) -> bool:
    """Return whether a name is that of a parameter; constants have others (const_0.5_f32)."""
    return "." in name and not name.startswith("const_")


def _compare(
    ours: Mapping[str, ir.Value], exact: Mapping[str, ir.Value]
) -> tuple[dict[str, float], str | None]:
    """Measure all weights, and name those that are off."""
    steps, unequal, off = 0.0, 0, []
    stems = {name.removesuffix(QUANTIZED).removesuffix(SCALES) for name in ours}
    for name in sorted(stems ^ exact.keys()):
        unequal += 1
        off.append(name)
    for name in sorted(stems & exact.keys()):
        truth = _read(exact[name]).astype(np.float32)
        if name in ours:
            stored = _read(ours[name])
            wrong = not np.array_equal(stored, truth.astype(stored.dtype))
            unequal += wrong
        else:
            stored = ours[name + QUANTIZED]
            scales = _read(ours[name + SCALES])
            error = rounding_error(_read(stored), scales, truth, _bits(stored))
            steps, wrong = metrics.largest((steps, error)), not WEIGHTS["steps"].holds(error)
        if wrong:
            off.append(name)
    return {"steps": steps, "unequal": unequal}, some_names(off, limit=4) if off else None


def _read(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _bits(quantized: ir.Value) -> int:
    """Return the bits of the operator that unpacks the bytes, perhaps after a Reshape; else 8."""
    for node, _ in quantized.uses():
        if "bits" in node.attributes:
            return node.attributes["bits"].as_int()
        if node.op_type == "Reshape":
            return _bits(node.outputs[0])
    return 8


def rounding_error(
    quantized: Shaped[np.ndarray, ...],
    scales: Float[np.ndarray, ...],
    truth: Float[np.ndarray, ...],
    bits: int = 8,
) -> float:
    """Return the largest distance of a weight from its level, in steps; up to 0.5 is right.

    The top level has no positive twin, so that a weight above it may be a whole step away: there
    half of the distance counts. Past the outermost levels, the error of the scale by its own type
    (float16) does not count. Infinite where the shapes differ, or where a block
    without a scale is not zero.

    Args:
        quantized: int8 with scales that broadcast (a column each, or a row); uint8 [N, blocks,
            bytes] of a matrix, or [N, bytes] of an embedding, with scales [N, blocks].
        truth: [K, N] of a matrix, [N, K] of an embedding.
    """
    half_gaps = np.abs(np.spacing(scales)).astype(np.float32) / 2
    scales = scales.astype(np.float32)
    if quantized.dtype == np.uint8:
        if quantized.ndim == 3:
            truth = truth.T
        if bits == 4:
            quantized = np.stack([quantized & 15, quantized >> 4], axis=-1)
        block = quantized.size // scales.size
        pad = scales.shape[1] * block - truth.shape[1]
        if not 0 <= pad < block:
            return float("inf")
        truth = np.pad(truth, ((0, 0), (0, pad))).reshape(-1, scales.shape[1], block)
        levels = quantized.reshape(*scales.shape, block).astype(np.float32) - (1 << (bits - 1))
        scales, half_gaps = scales[..., None], half_gaps[..., None]
    else:
        levels = quantized.astype(np.float32)
    if levels.shape != truth.shape:
        return float("inf")
    if np.any((scales == 0) & (np.abs(truth) >= TINY)):
        return float("inf")
    exact = np.divide(truth, scales, out=np.zeros_like(truth), where=scales != 0)
    distance = np.abs(exact - levels)
    zero = 1 << (bits - 1)
    above, below = (levels == zero - 1) & (exact > zero - 1), (levels == -zero) & (exact < -zero)
    lost = zero * np.divide(half_gaps, np.abs(scales), out=np.zeros_like(scales), where=scales != 0)
    distance = np.where(above | below, np.maximum(distance - lost, 0), distance)
    distance[above] /= 2
    return float(distance.max(initial=0))
