"""Compute the place of each patch of a call: for all images together, and for grids of any size.

Source: transformers 5.23, vision_utils.py, get_vision_position_ids and get_vision_cu_seqlens,
which loop over the images in Python; a graph traced from them knows only the sizes it was traced
with. Here everything is arithmetic on the input `image_grid_thw`.

A processor orders patches image by image, frame by frame, in blocks of m x m (m is the merge size):
block after block along a row of blocks, within a block row by row. So the patches that become one
token are next to each other.

F frames (a still image is one frame), N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder
from vlmport.graph.refusal import refuse

__all__ = ["Frames", "Patches", "frames_of", "owners", "starts_of"]

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Frames:
    """The frames of a call, in order.

    Attributes:
        heights, widths: i64 [F], in patches.
        sizes: i64 [F], their products.
    """

    heights: ir.Value
    widths: ir.Value
    sizes: ir.Value

    def patches(self, op: OpBuilder, merge: int) -> Patches:
        """List all patches, in the processor's order."""
        frame = owners(op, self.sizes)
        start, height, width = (
            op.Gather(of, frame) for of in (starts_of(op, self.sizes), self.heights, self.widths)
        )
        place = op.Sub(op.Range(0, op.Squeeze(op.Shape(frame), [0]), 1), start)
        block, within = op.Div(place, merge**2), op.Mod(place, merge**2)
        blocks = op.Div(width, merge)  # along a row
        row = op.Add(op.Mul(op.Div(block, blocks), merge), op.Div(within, merge))
        column = op.Add(op.Mul(op.Mod(block, blocks), merge), op.Mod(within, merge))
        return Patches(frame, height, width, row, column)


@dataclass(frozen=True)
class Patches:
    """The places of patches, one entry for each.

    Attributes:
        frame: i64 [N], the frame it belongs to.
        height, width: i64 [N], the sides of that frame, in patches.
        row, column: i64 [N], its place there.
    """

    frame: ir.Value
    height: ir.Value
    width: ir.Value
    row: ir.Value
    column: ir.Value


def frames_of(op: OpBuilder, grids: ir.Value, rows: ir.Value, merge: int) -> Frames:
    """Read the frames of image_grid_thw i64 [num_images, 3]: frames, rows and columns of patches.

    Args:
        rows: i64 [1], number of patches. The graph refuses grids of another number, and sides that
            `merge` does not divide.
    """
    times, heights, widths = (
        op.Squeeze(column, [1]) for column in op.Split(grids, axis=1, num_outputs=3, _outputs=3)
    )
    bad = op.Or(op.Less(grids, 1), op.Cast(op.Mod(grids, [1, merge, merge]), to=ir.DataType.BOOL))
    times = refuse(
        op,
        times,
        op.Cast(op.ReduceMax(op.Cast(bad, to=INT64), keepdims=0), to=ir.DataType.BOOL),
        f"image_grid_thw: a side is 0 or not a multiple of {merge}",
        "pass what image_processor gives",
    )
    counts = op.Mul(times, op.Mul(heights, widths))
    times = refuse(
        op,
        times,
        op.Not(op.Equal(op.ReduceSum(counts, keepdims=1), rows)),
        "image_grid_thw and the rows of pixel_values do not match",
        "pass both as image_processor gives them; of several pictures, one below the other",
    )
    picture = owners(op, times)
    heights, widths = op.Gather(heights, picture), op.Gather(widths, picture)
    return Frames(heights, widths, op.Mul(heights, widths))


def starts_of(op: OpBuilder, sizes: ir.Value) -> ir.Value:
    """Compute the beginning of each of consecutive runs of these sizes: i64 [n]."""
    return op.CumSum(sizes, op.Constant(value_int=0), exclusive=1)


def owners(op: OpBuilder, sizes: ir.Value) -> ir.Value:
    """Compute the run of each element of consecutive runs: [2, 3] → [0, 0, 1, 1, 1]."""
    ends = op.CumSum(sizes, op.Constant(value_int=0))
    count = op.Squeeze(op.ReduceSum(sizes, keepdims=1), [0])
    is_past = op.LessOrEqual(op.Unsqueeze(ends, [1]), op.Range(0, count, 1))  # [n, count]
    return op.ReduceSum(op.Cast(is_past, to=INT64), [0], keepdims=0)
