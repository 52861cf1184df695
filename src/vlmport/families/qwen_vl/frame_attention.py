"""Full attention within each frame of a call: frames of different sizes, independent of each other.

There is no mask and no padding. Frames of one size, and a single frame above all, are the rows of a
batch. Frames of different sizes are computed one after the other, so that the largest scores are
those of the largest frame, as if it were alone. Rows padded to the longest would take [F, H, M, M]
scores, and a mask over all patches [H, N, N].

F frames, M patches of the largest, N patches of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graph.branches import fold, if_else
from vlmport.graph.builder import MICROSOFT, OpBuilder
from vlmport.graph.grids import starts_of

__all__ = ["FrameAttention"]

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class FrameAttention:
    """The values that all layers of a tower share.

    Attributes:
        are_even: bool [1], whether all frames have one size.
        count: i64 [1], number of frames.
        starts, ends: i64 [F], the first patch of each, and the first after it.
    """

    are_even: ir.Value
    count: ir.Value
    starts: ir.Value
    ends: ir.Value
    heads: int
    dtype: ir.DataType

    @classmethod
    def over(
        cls, op: OpBuilder, sizes: ir.Value, heads: int, dtype: ir.DataType = FLOAT
    ) -> FrameAttention:
        """Prepare for frames of i64 [F] patches, one after the other; values are of `dtype`."""
        are_even = op.Equal(op.ReduceMax(sizes, keepdims=1), op.ReduceMin(sizes, keepdims=1))
        starts = starts_of(op, sizes)
        return cls(are_even, op.Shape(sizes), starts, op.Add(starts, sizes), heads, dtype)

    def attend(self, op: OpBuilder, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """q, k, v [1, N, D] → [1, N, D]."""

        def even_frames(op: OpBuilder) -> ir.Value:
            shape = op.Concat(self.count, [-1, 0], axis=0)
            rows = [op.Reshape(x, shape) for x in (q, k, v)]  # [F, M, D]
            return op.Reshape(self._attention(op, *rows), [1, -1, 0])

        def uneven_frames(op: OpBuilder) -> ir.Value:
            first = self._frame(op, op.Constant(value_ints=[0]), q, k, v)

            def next_frame(op: OpBuilder, step: ir.Value, done: ir.Value) -> ir.Value:
                number = op.Add(op.Reshape(step, [1]), 1)
                return op.Concat(done, self._frame(op, number, q, k, v), axis=1)

            return fold(op, op.Sub(self.count, 1), next_frame, first, self.dtype, 3)

        return if_else(op, self.are_even, even_frames, uneven_frames, self.dtype, 3)

    def _frame(self, op: OpBuilder, number: ir.Value, *qkv: ir.Value) -> ir.Value:
        """Compute the attention of the frame with this number i64 [1]: [1, its patches, D]."""
        start, end = op.Gather(self.starts, number), op.Gather(self.ends, number)
        return self._attention(op, *(op.Slice(x, start, end, [1]) for x in qkv))

    def _attention(self, op: OpBuilder, *qkv: ir.Value) -> ir.Value:
        return op.MultiHeadAttention(*qkv, num_heads=self.heads, _domain=MICROSOFT)
