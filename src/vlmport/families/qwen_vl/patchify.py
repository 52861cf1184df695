"""Cut an image into rows of patches, in the order in which a tower merges them.

Source: transformers 5.23, image_processing_pil_qwen2_vl.py, patchify.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

__all__ = ["Patching"]


@dataclass(frozen=True)
class Patching:
    """The sizes for cutting an image.

    Attributes:
        size: pixels of a patch's side.
        frames: number of repetitions of a still image in time.
        merge: patches of a token's side.
    """

    size: int
    frames: int
    merge: int

    @property
    def factor(self) -> int:
        """Pixels of a token's side: both sides of an image are multiples of it."""
        return self.size * self.merge

    @property
    def width(self) -> int:
        """Numbers in a row, C·T·p·p."""
        return 3 * self.frames * self.size**2

    def cut(self, op: OpBuilder, image: ir.Value) -> ir.Value:
        """uint8 [H, W, 3] → uint8 [N, 3, p, p], block after block of merge x merge patches."""
        p, m = self.size, self.merge
        size = op.Div(op.Shape(image, end=2), self.factor)  # [2]: rows and columns of blocks
        rows, columns = op.Split(size, axis=0, num_outputs=2, _outputs=2)
        blocks = op.Reshape(image, op.Concat(rows, [m, p], columns, [m, p, 3], axis=0))
        blocks = op.Transpose(blocks, perm=[0, 3, 1, 4, 6, 2, 5])  # [rows, columns, m, m, 3, p, p]
        return op.Reshape(blocks, [-1, 3, p, p])

    def rows(self, op: OpBuilder, patches: ir.Value) -> ir.Value:
        """float32 [N, 3, p, p] → [N, 3·T·p·p], each channel once for every frame."""
        area = self.size**2
        patches = op.Reshape(patches, [0, 3, 1, area])
        repeated = op.Expand(patches, [1, 1, self.frames, 1])
        return op.Reshape(repeated, [0, self.width])

    def grid(self, op: OpBuilder, image: ir.Value) -> ir.Value:
        """Write image_grid_thw i64 [1, 3] of that image."""
        sides = op.Div(op.Shape(image, end=2), self.size)
        return op.Unsqueeze(op.Concat([1], sides, axis=0), [0])
