"""Full attention within each frame of a call: frames of different sizes, none seeing another.

One frame, which is one picture, takes no mask at all. Several are laid out as the rows of a
batch, each as long as the longest, with a bias that hides what fills them up: their scores are
[F, H, M, M], not [H, N, N] over all patches of all pictures. That is the less where frames are of
about one size; one large picture among many small ones is better encoded by itself, as vlmport's
own runtimes encode each.

F frames, M patches of the largest, N patches of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graph.branches import if_else
from vlmport.graph.builder import MICROSOFT, OpBuilder
from vlmport.graph.grids import owners, starts_of

__all__ = ["FrameAttention"]

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
MASKED = -10000.0  # added to scores of what fills a row up: exp() of it is 0, float16 holds it well


@dataclass(frozen=True)
class FrameAttention:
    """What all layers of a tower share.

    Attributes:
        is_one: bool [1], whether there is one frame.
        rows: i64 [F, M], the patch at each place of the batch; after a frame's last, that again.
        bias: [F, 1, M, M], 0 or MASKED; [1, 1, 1, M] for one frame, where nothing reads it.
        places: i64 [N], where in F·M each patch has gone.
    """

    is_one: ir.Value
    rows: ir.Value
    bias: ir.Value
    places: ir.Value
    heads: int
    dtype: ir.DataType

    @classmethod
    def over(
        cls, op: OpBuilder, sizes: ir.Value, heads: int, dtype: ir.DataType = FLOAT
    ) -> FrameAttention:
        """For frames of i64 [F] patches, which lie one after the other; scores are of `dtype`."""
        count, longest = op.Shape(sizes), op.ReduceMax(sizes, keepdims=1)  # [1], [1]
        start, frame = starts_of(op, sizes), owners(op, sizes)
        place = op.Range(0, op.Squeeze(longest, [0]), 1)  # [M]
        own, last = op.Unsqueeze(sizes, [1]), op.Sub(op.Unsqueeze(sizes, [1]), 1)
        rows = op.Add(op.Unsqueeze(start, [1]), op.Min(op.Unsqueeze(place, [0]), last))
        bias = op.Where(op.Less(op.Unsqueeze(place, [0]), own), 0.0, MASKED)  # [F, M]
        is_one = op.Equal(count, 1)
        queries = op.Where(is_one, op.Constant(value_ints=[1]), longest)
        shape = op.Concat(count, [1], queries, longest, axis=0)
        bias = op.Expand(op.Unsqueeze(bias, [1, 2]), shape)
        if dtype != FLOAT:
            bias = op.Cast(bias, to=dtype)
        number = op.Range(0, op.Squeeze(op.Shape(frame), [0]), 1)  # [N]
        within = op.Sub(number, op.Gather(start, frame))
        places = op.Add(op.Mul(frame, longest), within)
        return cls(is_one, rows, bias, places, heads, dtype)

    def attend(self, op: OpBuilder, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """q, k, v [1, N, D] → [1, N, D]."""

        def one_frame(op: OpBuilder) -> ir.Value:
            return op.MultiHeadAttention(q, k, v, num_heads=self.heads, _domain=MICROSOFT)

        def several_frames(op: OpBuilder) -> ir.Value:
            rows = [op.Squeeze(op.Gather(x, self.rows, axis=1), [0]) for x in (q, k, v)]
            y = op.MultiHeadAttention(  # [F, M, D]
                *rows, None, None, self.bias, num_heads=self.heads, _domain=MICROSOFT
            )
            flat = op.Reshape(y, op.Concat([1, -1], op.Shape(q, start=2), axis=0))
            return op.Gather(flat, self.places, axis=1)

        return if_else(op, self.is_one, one_frame, several_frames, self.dtype, 3)
