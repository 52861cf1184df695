"""The layers that every family shares, each in the operator form that works everywhere.

Which forms work, are slow or are silently wrong on which runtime is measured, not guessed: the
choices here are the fast ones that are right in Python, Node, WASM and WebGPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlmport.graph.builder import MICROSOFT, OpBuilder
from vlmport.graph.parameters import (
    FLOAT32,
    Format,
    Quantize,
    Quantizer,
    Source,
    Weight,
    append_rows,
    quantize_blocks,
    quantize_columns,
    transposed,
)

FLOAT = ir.DataType.FLOAT


class Linear(nn.Module):
    """y = x·Wᵀ + b, with W [out, in] as checkpoints store it.

    Floats are a MatMul with the transposed weight. Blocks of integers are MatMulNBits, whose
    accuracy_level is always 4 (8-bit activations): level 0 is fifty times slower for 8-bit
    weights. W8A8 is the pattern that ONNX Runtime fuses into one kernel.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | Mapping[str, int],
        *,
        bias: bool = False,
        form: Format = FLOAT32,
    ):
        """Make a layer; `outputs` may be several: name in the checkpoint → width.

        These are computed as one matrix, because fewer and larger ones are faster, and are next to
        each other in y.
        """
        parts: dict[str | None, int] = {None: outputs} if isinstance(outputs, int) else {**outputs}
        super().__init__()
        self.inputs, self.outputs, self.form = inputs, sum(parts.values()), form
        whole = (self.outputs, inputs)
        shapes = {name: (rows, inputs) for name, rows in parts.items()}
        if form.bits is None:
            self.weight = Weight(
                (inputs, self.outputs),
                sources=[
                    Source(shape, lambda load: transposed(load()), name)
                    for name, shape in shapes.items()
                ],
                axis=1,
                dtype=form.dtype,
            )
        elif form.dynamic:
            self.weight_quantized, self.weight_scales = quantized_weights(
                shapes, _dynamic_shapes(whole), quantize_columns, form
            )
        else:
            self.weight_quantized, self.weight_scales = quantized_weights(
                shapes, _block_shapes(whole, form), lambda w: quantize_blocks(w, form), form
            )
        biases = [Source((rows,), module=name) for name, rows in parts.items()]
        self.bias = Weight((self.outputs,), sources=biases, dtype=form.dtype) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        if self.form.bits is not None and not self.form.dynamic:
            return self._blocks(op, x)
        y = self._dynamic(op, x) if self.form.dynamic else op.MatMul(x, self.weight)
        return y if self.bias is None else op.Add(y, self.bias)

    def _blocks(self, op: OpBuilder, x: ir.Value) -> ir.Value:
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

    def _dynamic(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        rounded, scale, zero = op.DynamicQuantizeLinear(x, _outputs=3)
        sums = op.Cast(op.MatMulInteger(rounded, self.weight_quantized, zero), to=FLOAT)
        return op.Mul(sums, op.Mul(scale, self.weight_scales))


class Embedding(nn.Module):
    """Rows of a table [V, D] by id, with `extra_rows` rows of zeros appended for new tokens."""

    def __init__(self, rows: int, width: int, *, extra_rows: int = 0, form: Format = FLOAT32):
        super().__init__()
        self.form, self.width = form, width
        source, total = (rows, width), rows + extra_rows
        if form.bits is None:
            self.weight = Weight(
                (total, width),
                source_shape=source,
                convert=lambda load: append_rows(load(), extra_rows),
                dtype=form.dtype,
            )
            return

        def quantize(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            quantized, scales = quantize_blocks(append_rows(table, extra_rows), form)
            return quantized.reshape(total, -1), scales

        blocks = -(-width // form.block_size)  # the last one may be filled up with zeros
        self.padded = blocks * form.block_size
        shapes = (total, self.padded * form.bits // 8), (total, blocks)
        self.weight_quantized, self.weight_scales = quantized_weights(
            {None: source}, shapes, quantize, form
        )

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """ids i64[B, S] → f32[B, S, D], for any type of the table."""
        rows = self._gather(op, ids)
        return rows if self.form.dtype == FLOAT else op.Cast(rows, to=FLOAT)

    def _gather(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        if self.form.bits is None:
            return op.Gather(self.weight, ids)
        gather = self._gather_bytes if self.form.bits == 8 else self._gather_nibbles
        rows = gather(op, ids)
        return rows if self.padded == self.width else op.Slice(rows, [0], [self.width], [2])

    def _gather_nibbles(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
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

    def _gather_bytes(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """GatherBlockQuantized by standard operators, to the bit.

        ONNX Runtime's WebAssembly kernels have the operator in the plain build only; the build
        with WebGPU, which transformers.js takes for every device, lacks it.
        """
        size = self.form.block_size
        levels = op.Cast(op.Gather(self.weight_quantized, ids), to=self.form.dtype)  # [B, S, D]
        # No -1: of no ids at all, no size follows from the others.
        blocks = op.Reshape(levels, [0, 0, self.padded // size, size])  # [B, S, blocks, block]
        scales = op.Unsqueeze(op.Gather(self.weight_scales, ids), [-1])  # [B, S, blocks, 1]
        zero = op.CastLike(128.0, blocks)
        return op.Reshape(op.Mul(op.Sub(blocks, zero), scales), [0, 0, self.padded])


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def quantized_weights(
    parts: Mapping[str | None, tuple[int, int]], shapes: Shapes, quantize: Quantize, form: Format
) -> tuple[Weight, Weight]:
    """The two initializers of one matrix: its integers and their scales.

    `parts` are the matrices of the checkpoint that it is made from: module → shape.
    """
    quantizers = {name: Quantizer(quantize) for name in parts}
    halves = (
        [Source(shape, quantizers[name].quantized, name) for name, shape in parts.items()],
        [Source(shape, quantizers[name].scales, name) for name, shape in parts.items()],
    )
    dtype, axis = (ir.DataType.INT8, 1) if form.dynamic else (ir.DataType.UINT8, 0)
    return (
        Weight(shapes[0], sources=halves[0], axis=axis, alias="weight", dtype=dtype),
        Weight(shapes[1], sources=halves[1], alias="weight", dtype=form.dtype),
    )


def _block_shapes(source: tuple[int, int], form: Format) -> Shapes:
    assert form.bits is not None
    outputs, inputs = source
    blocks = -(-inputs // form.block_size)
    return (outputs, blocks, form.block_size * form.bits // 8), (outputs, blocks)


def _dynamic_shapes(source: tuple[int, int]) -> Shapes:
    outputs, inputs = source
    return (inputs, outputs), (outputs,)


class LayerNorm(nn.Module):
    """Mean and variance over the last axis. Plain, because the fused Skip form is slow on CPU."""

    def __init__(self, width: int, epsilon: float, form: Format = FLOAT32):
        super().__init__()
        self.epsilon = epsilon
        self.weight = Weight((width,), dtype=form.dtype)
        self.bias = Weight((width,), dtype=form.dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, width: int, epsilon: float, form: Format = FLOAT32):
        super().__init__()
        self.epsilon = epsilon
        self.weight = Weight((width,), dtype=form.dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)


class SkipRMSNorm(nn.Module):
    """RMSNorm of a sum, fused with the residual addition before it where there is one."""

    def __init__(self, width: int, epsilon: float, form: Format = FLOAT32):
        super().__init__()
        self.epsilon = epsilon
        self.weight = Weight((width,), dtype=form.dtype)

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


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)); gate and up are one matrix."""

    def __init__(self, width: int, inner: int, activation: str, *, bias: bool, form: Format):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = Linear(width, parts, bias=bias, form=form)
        self.down_proj = Linear(inner, width, bias=bias, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        halves = [self.down_proj.inputs] * 2
        gate, up = op.Split(self.gate_up_proj(op, x), halves, axis=-1, _outputs=2)
        return self.down_proj(op, op.Mul(self.activation(op, gate), up))
