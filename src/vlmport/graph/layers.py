"""The layers that every family shares, each in the operator form that works everywhere.

Which forms work, are slow or are silently wrong on which runtime is measured, not guessed: the
choices here are the fast ones that are right in Python, Node, WASM and WebGPU.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlmport.errors import ExportError
from vlmport.graph.builder import MICROSOFT, OpBuilder
from vlmport.graph.weights import FLOAT32, BlockQuantizer, Format, Weight, append_rows


class Linear(nn.Module):
    """y = x·Wᵀ + b, with W [out, in] as checkpoints store it.

    float32 is a MatMul with the transposed weight, integers are MatMulNBits. Its accuracy_level
    is always 4 (8-bit activations): level 0 is fifty times slower for 8-bit weights.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, form: Format = FLOAT32):
        super().__init__()
        self.inputs, self.outputs, self.form = inputs, outputs, form
        source = (outputs, inputs)
        if form.bits is None:
            self.weight = Weight(
                (inputs, outputs),
                source_shape=source,
                convert=lambda load: np.ascontiguousarray(load().T),
            )
        else:
            blocks = -(-inputs // form.block_size)
            quantizer = BlockQuantizer(form)
            self.weight_quantized = Weight(
                (outputs, blocks, form.block_size * form.bits // 8),
                source_shape=source,
                convert=quantizer.quantized,
                alias="weight",
                dtype=ir.DataType.UINT8,
            )
            self.weight_scales = Weight(
                (outputs, blocks), source_shape=source, convert=quantizer.scales, alias="weight"
            )
        self.bias = Weight((outputs,)) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        if self.form.bits is None:
            y = op.MatMul(x, self.weight)
            return y if self.bias is None else op.Add(y, self.bias)
        return op.MatMulNBits(
            x,
            self.weight_quantized,
            self.weight_scales,
            *([] if self.bias is None else [None, None, self.bias]),
            K=self.inputs,
            N=self.outputs,
            bits=self.form.bits,
            block_size=self.form.block_size,
            accuracy_level=4,
            _domain=MICROSOFT,
        )


class Embedding(nn.Module):
    """Rows of a table [V, D] by id, with `extra_rows` rows of zeros appended for new tokens."""

    def __init__(self, rows: int, width: int, *, extra_rows: int = 0, form: Format = FLOAT32):
        super().__init__()
        self.form = form
        source, total = (rows, width), rows + extra_rows
        if form.bits is None:
            self.weight = Weight(
                (total, width),
                source_shape=source,
                convert=lambda load: append_rows(load(), extra_rows),
            )
            return
        if width % form.block_size:
            raise ExportError(
                f"a {form.bits}-bit embedding of width {width}: the width must be a multiple of "
                f"{form.block_size}",
                hint="export this model as fp32",
            )
        quantizer = BlockQuantizer(form, extra_rows)
        self.weight_quantized = Weight(
            (total, width * form.bits // 8),
            source_shape=source,
            convert=lambda load: quantizer.quantized(load).reshape(total, -1),
            alias="weight",
            dtype=ir.DataType.UINT8,
        )
        self.weight_scales = Weight(
            (total, width // form.block_size),
            source_shape=source,
            convert=quantizer.scales,
            alias="weight",
        )

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """ids i64[B, S] → f32[B, S, D]."""
        if self.form.bits is None:
            return op.Gather(self.weight, ids)
        return op.GatherBlockQuantized(
            self.weight_quantized,
            ids,
            self.weight_scales,
            bits=self.form.bits,
            block_size=self.form.block_size,
            gather_axis=0,
            quantize_axis=1,
            _domain=MICROSOFT,
        )


class LayerNorm(nn.Module):
    """Mean and variance over the last axis. Plain, because the fused Skip form is slow on CPU."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight, self.bias = Weight((width,)), Weight((width,))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon)


class RMSNorm(nn.Module):
    """Root-mean-square norm, fused with the residual addition before it where there is one."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = Weight((width,))

    def forward(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None = None
    ) -> tuple[ir.Value, ir.Value]:
        """norm(x + residual) and x + residual, both shaped as x."""
        if residual is None:
            return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon), x
        normed, _, _, total = op.SkipSimplifiedLayerNormalization(
            x, residual, self.weight, epsilon=self.epsilon, _domain=MICROSOFT, _outputs=4
        )
        return normed, total


# Activation names of Hugging Face configs → the operator form.
ACTIVATIONS = {
    "gelu": lambda op, x: op.Gelu(x),
    "gelu_pytorch_tanh": lambda op, x: op.Gelu(x, approximate="tanh"),
    "silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
}
