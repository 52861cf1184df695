"""Tensors stored in few bits and used as floats: patch kernels, position tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlmport.graph.builder import OpBuilder
from vlmport.graph.parameters import TINY, Format, Quantizer, Weight

if TYPE_CHECKING:
    from jaxtyping import Float, Int8


def quantize_rows(
    tensor: Float[np.ndarray, "N ..."],
) -> tuple[Int8[np.ndarray, "N ..."], Float[np.ndarray, "N ..."]]:
    """Round to 255 levels, symmetric, with a broadcasting scale for each index of the first axis.

    For tensors stored in 8 bits and used as floats.
    """
    rest = tuple(range(1, tensor.ndim))
    scales = np.abs(tensor).max(axis=rest, keepdims=True, initial=0).astype(np.float32) / 127
    scales[scales < TINY] = 1  # nothing but zeros
    return np.rint(tensor / scales).astype(np.int8), scales


class Stored(nn.Module):
    """A tensor that is used as floats: stored in 8 bits in q8, as floats otherwise.

    q8 is chosen for its size; ONNX Runtime unpacks the tensor when a session opens.
    """

    def __init__(self, shape: tuple[int, ...], form: Format):
        super().__init__()
        self.packed = form.dynamic
        if not self.packed:
            self.weight = Weight(shape, dtype=form.dtype)
            return
        quantizer = Quantizer(quantize_rows)
        rows = (shape[0], *(1 for _ in shape[1:]))
        self.weight_quantized = Weight(
            shape, convert=quantizer.quantized, alias="weight", dtype=ir.DataType.INT8
        )
        self.weight_scales = Weight(
            rows, source_shape=shape, convert=quantizer.scales, alias="weight"
        )

    def tensor(self, op: OpBuilder) -> ir.Value:
        if not self.packed:
            return self.weight
        return op.Mul(op.Cast(self.weight_quantized, to=ir.DataType.FLOAT), self.weight_scales)
