"""The angles of rotary position embeddings."""

from __future__ import annotations

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

FLOAT = ir.DataType.FLOAT


def rotary_angles(
    op: OpBuilder, positions: ir.Value, head_dim: int, theta: float
) -> tuple[ir.Value, ir.Value]:
    """cos and sin f32[B, S, head_dim/2], computed in the graph: no table, no longest position.

    Args:
        positions: i64[B, S].

    Source: transformers 5.23, LlamaRotaryEmbedding, which computes them in float32 too.
    """
    return cos_and_sin(op, op.Unsqueeze(op.Cast(positions, to=FLOAT), [2]), head_dim, theta)


def cos_and_sin(
    op: OpBuilder, positions: ir.Value, head_dim: int, theta: float
) -> tuple[ir.Value, ir.Value]:
    """Of positions f32[B, S, 1], or of one for each frequency, f32[B, S, head_dim/2]."""
    frequencies = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    angles = op.Mul(positions, op.Constant(value_floats=frequencies))
    return op.Cos(angles), op.Sin(angles)
