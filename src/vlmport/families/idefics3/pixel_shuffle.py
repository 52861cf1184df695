"""The pixel shuffle: neighbouring patches side by side in one row, then one matrix.

Source: transformers 5.23, modeling_idefics3.py, Idefics3Connector.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from vlmport.graph.builder import OpBuilder
from vlmport.graph.layers import Linear
from vlmport.graph.parameters import Format


class Connector(nn.Module):
    """Patches [n, N, V] of squares of `side` a side → [n, N / f², D].

    A row of the result is made of f x f patches, those of one row of the image next to each
    other, the rows one after the other.
    """

    def __init__(self, name: str, side: int, factor: int, vision: int, text: int, form: Format):
        super().__init__(name)
        self.side, self.factor, self.vision = side, factor, vision
        self.modality_projection = Projection(vision * factor**2, text, form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        f, small, row = self.factor, self.side // self.factor, self.factor * self.vision
        x = op.Reshape(x, [0, small, f, small, row])
        x = op.Transpose(x, perm=[0, 1, 3, 2, 4])  # [n, side / f, side / f, f, f V]
        return self.modality_projection(op, op.Reshape(x, [0, small * small, f * row]))


class Projection(nn.Module):
    """One matrix; a module of its own for the name `modality_projection.proj`."""

    def __init__(self, inputs: int, outputs: int, form: Format):
        super().__init__()
        self.proj = Linear(inputs, outputs, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.proj(op, x)
