"""Cut an image into square tiles, and write the tokens for them.

Source: transformers 5.23, image_processing_pil_idefics3.py and processing_idefics3.py. An image is
resized until its longest edge has a set length (small ones grow), each side is then enlarged to a
multiple of the tile's, and the tiles are cut row by row; the whole image, squeezed into one tile,
comes last. Without splitting that last one is all there is.

R rows and C columns of tiles (0 without splitting, and if one tile is the image), t the side
of a tile, n = R C + 1, k image tokens a tile.

Traps:
- Every stage resizes the bytes of the stage before: the last tile is not made from the image
  itself, and the longest edge comes first even without splitting.
- Sides are cut to whole numbers after a division in doubles, see double_sides.py.
- The newline after the last row and the one before the whole image become one token if the
  tokenizer has one for two newlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmport.families.idefics3.double_sides import other_side
from vlmport.graph.builder import OpBuilder
from vlmport.graph.pillow_resize import Resample, resize

__all__ = ["MAX_SIDE", "TileTokens", "Tiles", "Tiling"]

INT64 = ir.DataType.INT64
MAX_SIDE = 4096  # independent of the config


@dataclass(frozen=True)
class Tiles:
    """An image as tiles.

    Attributes:
        planes: uint8 [n, 3, t, t], rows first, the whole image last.
        rows, columns: int64 [1].
    """

    planes: ir.Value
    rows: ir.Value
    columns: ir.Value


@dataclass(frozen=True)
class Tiling:
    """The sizes for cutting an image.

    Attributes:
        longest_edge: pixels of the longer side before it is enlarged to whole tiles.
        side: pixels of a tile's side.
    """

    longest_edge: int
    side: int
    resample: Resample

    @property
    def most(self) -> int:
        """Maximum number of tiles in a row or a column; a side may be rounded up to even."""
        even = min(self.longest_edge + self.longest_edge % 2, MAX_SIDE)
        tiles = -(-even // self.side)
        return tiles if tiles > 1 else 0

    def cut(self, op: OpBuilder, image: ir.Value, split: ir.Value) -> Tiles:
        """image uint8 [H, W, 3] and split bool [] → tiles."""
        size = op.Shape(image, end=2)
        first = self._fit(op, op.Slice(size, [0], [1]), op.Slice(size, [1], [2]))
        whole = self._whole_tiles(op, *first)
        height, width = (op.Where(split, *pair) for pair in zip(whole, first, strict=True))
        picture = self._resize(op, image, *first)
        picture = self._resize(op, picture, height, width)

        side = self.side
        are_several = op.And(split, op.Greater(op.Max(height, width), side))
        rows, columns = (
            op.Where(are_several, op.Div(length, side), op.Constant(value_ints=[0]))
            for length in (height, width)
        )
        ends = op.Mul(op.Concat(rows, columns, axis=0), side)
        grid = op.Slice(picture, [0, 0], ends, [0, 1])  # [R t, C t, 3]
        shape = op.Concat(rows, [side], columns, [side, 3], axis=0)
        grid = op.Reshape(grid, shape, allowzero=1)  # [R, t, C, t, 3]
        grid = op.Transpose(grid, perm=[0, 2, 4, 1, 3])  # [R, C, 3, t, t]
        shape = op.Concat(op.Mul(rows, columns), [3, side, side], axis=0)
        grid = op.Reshape(grid, shape, allowzero=1)
        last = op.Transpose(resize(op, picture, side, side, self.resample), perm=[2, 0, 1])
        return Tiles(op.Concat(grid, op.Unsqueeze(last, [0]), axis=0), rows, columns)

    def _resize(
        self, op: OpBuilder, image: ir.Value, height: ir.Value, width: ir.Value
    ) -> ir.Value:
        return resize(op, image, op.Squeeze(height), op.Squeeze(width), self.resample)

    def _fit(self, op: OpBuilder, height: ir.Value, width: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Compute the size with longest_edge as longer side; the shorter is even, at least 1."""
        edge = op.Constant(value_ints=[self.longest_edge])
        other = other_side(op, edge, width, height)
        other = op.Max(op.Add(other, op.Mod(other, 2)), 1)
        height, width = _oriented(op, height, width, edge, other)
        if self.longest_edge <= MAX_SIDE:
            return height, width
        edge = op.Constant(value_ints=[MAX_SIDE])
        return _oriented(op, height, width, edge, op.Max(other_side(op, edge, width, height), 1))

    def _whole_tiles(
        self, op: OpBuilder, height: ir.Value, width: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Enlarge each side of that size to a multiple of the tile's."""

        def enlarged(length: ir.Value) -> ir.Value:
            return op.Mul(op.Div(op.Add(length, self.side - 1), self.side), self.side)

        longer = enlarged(op.Max(height, width))
        shorter = enlarged(op.Max(other_side(op, longer, width, height), 1))
        return _oriented(op, height, width, longer, shorter)


def _oriented(
    op: OpBuilder, height: ir.Value, width: ir.Value, longer: ir.Value, shorter: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Order the sides as (height, width), in the orientation of the old height and width."""
    is_wide = op.GreaterOrEqual(width, height)
    return op.Where(is_wide, shorter, longer), op.Where(is_wide, longer, shorter)


@dataclass(frozen=True)
class TileTokens:
    """The token ids of an image in a prompt.

    Attributes:
        fence: before each tile, and after the last.
        whole: marks the whole image.
        markers: of row r and column c, [most, most].
        image, count: the image token, and its number of repetitions for a tile.
        newline, newlines: the ids of one newline, and of two.
    """

    fence: int
    whole: int
    markers: np.ndarray
    image: int
    count: int
    newline: Sequence[int]
    newlines: Sequence[int]

    @property
    def alone(self) -> tuple[int, ...]:
        """The ids of an image that is not split."""
        return (self.fence, self.whole, *[self.image] * self.count, self.fence)

    def write(self, op: OpBuilder, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """Write prompt_ids int64 [T] of an image with this number of tiles."""
        grid = op.Concat(rows, columns, axis=0)
        markers = op.Slice(_ids(op, self.markers), [0, 0], grid, [0, 1])  # [R, C]
        tile = op.Concat(
            op.Expand(_ids(op, [self.fence]), op.Concat(grid, [1], axis=0)),
            op.Unsqueeze(markers, [2]),
            op.Expand(_ids(op, [self.image]), op.Concat(grid, [self.count], axis=0)),
            axis=2,
        )  # [R, C, k + 2]
        row = op.Concat(rows, op.Mul(columns, self.count + 2), axis=0)
        newline = op.Expand(_ids(op, self.newline), op.Concat(rows, [len(self.newline)], axis=0))
        lines = op.Concat(op.Reshape(tile, row, allowzero=1), newline, axis=1)
        length = op.Mul(rows, op.Add(op.Mul(columns, self.count + 2), len(self.newline)))
        lines = op.Reshape(lines, length, allowzero=1)
        lines = op.Slice(lines, [0], op.Max(op.Sub(length, len(self.newline)), 0), [0])
        between = op.Slice(
            _ids(op, self.newlines), [0], op.Mul(op.Min(rows, 1), len(self.newlines)), [0]
        )
        return op.Concat(lines, between, _ids(op, self.alone), axis=0)


def _ids(op: OpBuilder, ids: Sequence[int] | np.ndarray) -> ir.Value:
    return op.Constant(value=ir.tensor(np.asarray(ids, np.int64)))
