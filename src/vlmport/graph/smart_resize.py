"""Qwen's smart resize: sides that are whole blocks, and as many pixels as allowed.

Source: transformers 5.23, image_processing_pil_qwen2_vl.py, smart_resize.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

__all__ = ["SmartResize"]


@dataclass(frozen=True)
class SmartResize:
    """How the sides of a picture become multiples of `factor`."""

    factor: int

    def sides_of(self, height: int, width: int, least: int, most: int) -> tuple[int, int]:
        """The new height and width of a picture, for `least` to `most` pixels."""
        factor = self.factor
        new = tuple(round(side / factor) * factor for side in (height, width))
        if math.prod(new) > most:
            shrink = math.sqrt(height * width / most)
            new = tuple(
                max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
            )
        elif math.prod(new) < least:
            grow = math.sqrt(least / (height * width))
            new = tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
        return new[0], new[1]

    def sides(
        self, op: OpBuilder, height: ir.Value, width: ir.Value, least: ir.Value, most: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The same in a graph: int64 [1] each."""
        raise NotImplementedError
