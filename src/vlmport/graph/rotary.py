"""The angles of rotary position embeddings."""

from __future__ import annotations

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

FLOAT = ir.DataType.FLOAT


def rotary_angles(
    op: OpBuilder, positions: ir.Value, head_dim: int, theta: float
) -> tuple[ir.Value, ir.Value]:
    """cos and sin f32[B, S, head_dim/2] of positions i64[B, S], computed in the graph: no table,
    no longest position.

    Source: transformers 5.23, LlamaRotaryEmbedding, which computes them in float32 too.
    """
    table = frequencies(op, head_dim, theta)
    angles = op.Mul(op.Unsqueeze(op.Cast(positions, to=FLOAT), [2]), table)
    return op.Cos(angles), op.Sin(angles)


def frequencies(op: OpBuilder, head_dim: int, theta: float) -> ir.Value:
    """The factors of positions: f32[head_dim/2], fastest first."""
    return op.Constant(value_floats=[theta ** (-i / head_dim) for i in range(0, head_dim, 2)])
