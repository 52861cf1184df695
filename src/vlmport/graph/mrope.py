"""Positions in time, height and width (M-RoPE), and the frequencies that each axis rotates.

Source: transformers 5.23, get_rope_index of modeling_qwen2_5_vl.py and of modeling_qwen3_vl.py,
which agree about images, and recomposition_frequencies of both, which don't.

A text's tokens have one position, the same on all three axes. An image's tokens share the position
in time at which it begins; in height and width they count its rows and columns from there, in units
of merged patches. The next token's position follows the longer side. So a prompt with images has
fewer positions than tokens; `rope_delta` says by how many.

B batch, S tokens, I images, T tokens of all images together.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vlmport.graph.builder import GraphBuilder, OpBuilder, add_output, new_graph
from vlmport.graph.grids import owners, starts_of
from vlmport.graph.refusal import refuse
from vlmport.graph.rotary import frequencies

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def mrope_angles(
    op: OpBuilder,
    positions: ir.Value,
    head_dim: int,
    theta: float,
    section: Sequence[int],
    *,
    interleaved: bool,
) -> tuple[ir.Value, ir.Value]:
    """cos and sin f32[B, S, head_dim/2] of positions i64[3, B, S]."""
    axes = op.Constant(value_ints=axes_of_frequencies(section, interleaved=interleaved))
    by_axis = op.Transpose(op.Cast(positions, to=FLOAT), perm=[1, 2, 0])  # [B, S, 3]
    angles = op.Mul(op.Gather(by_axis, axes, axis=2), frequencies(op, head_dim, theta))
    return op.Cos(angles), op.Sin(angles)


def axes_of_frequencies(section: Sequence[int], *, interleaved: bool) -> list[int]:
    """List the axis that rotates each frequency, fastest first: 0 time, 1 height, 2 width.

    The axes follow one after the other (Qwen2.5-VL), or alternate until height and width have their
    share, and time has the rest (Qwen3-VL).
    """
    if not interleaved:
        return [axis for axis, count in enumerate(section) for _ in range(count)]
    axes = [0] * sum(section)
    for axis in (1, 2):
        for frequency in range(axis, 3 * section[axis], 3):
            if frequency < len(axes):
                axes[frequency] = axis
    return axes


def position_ids_graph(image_token_id: int, merge_size: int) -> GraphBuilder:
    """input_ids i64[B, S], attention_mask i64[B, S], image_grid_thw i64[I, 3] → position_ids
    i64[3, B, S], rope_delta i64[B, 1].

    image_grid_thw holds the images of all rows, in the order of their tokens. A padded token has
    position 0, on either side. `rope_delta` is the next token's position minus the number of tokens
    of its row.

    transformers treats images without a token between them as one, and fails; here each is
    separate, as it is with a token between them.
    """
    builder = new_graph("position_ids")
    op, dims = builder.op, ["batch_size", "sequence_length"]
    ids = builder.input("input_ids", INT64, dims)
    mask = builder.input("attention_mask", INT64, dims)
    grids = builder.input("image_grid_thw", INT64, ["num_images", 3])
    positions, delta = mrope_positions(op, ids, mask, grids, image_token_id, merge_size)
    add_output(builder, positions, "position_ids", INT64, [3, *dims])
    add_output(builder, delta, "rope_delta", INT64, ["batch_size", 1])
    return builder


def mrope_positions(
    op: OpBuilder,
    ids: ir.Value,
    mask: ir.Value,
    grids: ir.Value,
    image_token_id: int,
    merge_size: int,
) -> tuple[ir.Value, ir.Value]:
    """Write the same as part of a graph: position_ids and rope_delta."""
    is_real = op.Cast(mask, to=BOOL)
    is_image = op.And(op.Equal(ids, image_token_id), is_real)
    tokens = _ImageTokens(op, grids, is_image, merge_size)
    real = op.Cast(is_real, to=INT64)  # 1 and 0, for any values of the mask
    text = op.Sub(real, op.Cast(is_image, to=INT64))
    # An image's first token takes all the positions that the image takes.
    steps = op.Add(text, tokens.spread(op.Where(tokens.is_first, tokens.extent, 0)))
    before = op.CumSum(steps, op.Constant(value_int=1), exclusive=1)
    begin = op.Sub(before, tokens.spread(op.Where(tokens.is_first, 0, tokens.extent)))
    begin = tokens.checked(begin)
    places = [op.Add(begin, tokens.spread(place)) for place in tokens.places]  # each [B, S]
    positions = op.Mul(op.Concat(*[op.Unsqueeze(one, [0]) for one in places], axis=0), real)
    last = op.ReduceMax(positions, [0, 2], keepdims=0)  # [B]
    delta = op.Sub(op.Add(last, 1), op.ReduceSum(real, [1], keepdims=0))
    return positions, op.Unsqueeze(delta, [1])


class _ImageTokens:
    """The tokens of all images, row after row of the batch: [T] each.

    Attributes:
        places: in time, height and width within the image.
        extent: number of positions that the image takes.
        is_first: whether it is the image's first.
    """

    def __init__(self, op: OpBuilder, grids: ir.Value, is_image: ir.Value, merge: int):
        """grids i64[I, 3] in patches, is_image bool[B, S]."""
        self.op, self.is_image = op, is_image
        grids = self._whole(grids, merge)
        times, heights, widths = (
            op.Squeeze(side, [1]) for side in op.Split(grids, axis=1, num_outputs=3, _outputs=3)
        )
        sizes = op.Mul(times, op.Mul(heights, widths))  # [I]
        flat = op.Reshape(op.Cast(is_image, to=INT64), [-1])
        self.count = op.ReduceSum(flat, keepdims=1)  # [1]
        sizes = refuse(
            op,
            sizes,
            op.Not(op.Equal(op.ReduceSum(sizes, keepdims=1), self.count)),
            "image_grid_thw and the image tokens of input_ids do not match",
            "pass the grid of each picture, and its prompt_ids in its place",
        )
        picture = owners(op, sizes)  # [T]
        self.start = op.Gather(starts_of(op, sizes), picture)
        place = op.Sub(op.Range(0, op.Squeeze(self.count, [0]), 1), self.start)
        height, width = op.Gather(heights, picture), op.Gather(widths, picture)
        row = op.Div(place, width)
        self.places = op.Div(row, height), op.Mod(row, height), op.Mod(place, width)
        self.extent = op.Max(height, width)
        self.is_first = op.Equal(place, 0)
        # The index of each token of the batch among these; T if it is not an image token.
        number = op.Sub(op.CumSum(flat, op.Constant(value_int=0)), 1)
        number = op.Reshape(number, op.Shape(is_image))
        self.number = op.Where(is_image, number, self.count)

    def _whole(self, grids: ir.Value, merge: int) -> ir.Value:
        """Convert the grids to merged patches, i64[I, 3]."""
        op, unit = self.op, [1, merge, merge]
        bad = op.Or(op.Less(grids, 1), op.Cast(op.Mod(grids, unit), to=BOOL))
        grids = refuse(
            op,
            grids,
            op.Greater(op.ReduceSum(op.Cast(bad, to=INT64), keepdims=0), 0),
            f"image_grid_thw: a side is 0 or not a multiple of {merge}",
            "pass what image_processor gives",
        )
        return op.Div(grids, unit)

    def spread(self, values: ir.Value) -> ir.Value:
        """Values i64[T] where these tokens are in the batch, else 0: i64[B, S]."""
        return self.op.Gather(self.op.Concat(values, [0], axis=0), self.number)

    def checked(self, begin: ir.Value) -> ir.Value:
        """Return `begin` i64[B, S], the position at which each token's image begins; refuse images
        whose tokens are not together, because their values would differ."""
        op = self.op
        rows = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(begin, start=0, end=1), [0]), 1), [1])
        wrong = op.Constant(value_int=0)
        for of in (begin, op.Expand(rows, op.Shape(begin))):
            own = op.Compress(of, self.is_image)  # both flat: [T]
            wrong = op.Add(wrong, op.ReduceSum(op.Abs(op.Sub(own, op.Gather(own, self.start)))))
        return refuse(
            op,
            begin,
            op.Greater(wrong, 0),
            "input_ids: the tokens of a picture do not stand together",
            "each picture's prompt_ids go in whole, in its place",
        )
