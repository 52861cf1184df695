"""Project from the width of a vision tower to that of a decoder."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from vlmport.graph.builder import OpBuilder
from vlmport.graph.layers import ACTIVATIONS, Linear
from vlmport.graph.parameters import Format


class Projection(nn.Module):
    """One matrix, or with an `inner` width two, with an exact GELU between.

    The names are those of an nn.Linear or nn.Sequential that a module `projection` holds.
    """

    def __init__(self, vision: int, text: int, inner: int | None, form: Format):
        super().__init__("projection")
        if inner is None:
            self.projection = Linear(vision, text, bias=True, form=form)
        else:
            self.projection = Mlp(vision, inner, text, form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.projection(op, x)


class Mlp(nn.Module):
    def __init__(self, vision: int, inner: int, text: int, form: Format):
        super().__init__()
        first, last = (
            Linear(vision, inner, bias=True, form=form),
            Linear(inner, text, bias=True, form=form),
        )
        setattr(self, "0", first)
        setattr(self, "3", last)  # 1 is the GELU, 2 a dropout
        self.stages = (first, last)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        first, last = self.stages
        return last(op, ACTIVATIONS["gelu"](op, first(op, x)))
