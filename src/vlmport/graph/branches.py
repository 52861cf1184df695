"""Subgraphs: one of two branches, and names that differ inside from all outside, as ONNX wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

__all__ = ["if_else", "scope", "unique_name"]

Write = Callable[[OpBuilder], ir.Value]


@contextmanager
def scope(op: OpBuilder, name: str) -> Iterator[None]:
    """Prefix the names of everything written within."""
    op.builder.push_module(name)
    try:
        yield
    finally:
        op.builder.pop_module()


def unique_name(op: OpBuilder, name: str) -> str:
    """A name that no other call has: how far this graph, and each graph around it, has come."""
    builder, place = op.builder, []
    while builder is not None:
        place.append(str(builder.graph.num_nodes()))
        builder = builder.parent
    return name + "_".join(reversed(place))


def if_else(
    op: OpBuilder,
    condition: ir.Value,
    then_branch: Write,
    else_branch: Write,
    dtype: ir.DataType,
    rank: int,
) -> ir.Value:
    """What one branch or the other yields: a tensor of this type and rank.

    Args:
        condition: bool, one element.
        then_branch, else_branch: write a branch; values of the graph around may be used there.
            Their names become those of the branches, so they must differ.
    """
    kind, dims = ir.TensorType(dtype), [None] * rank

    def subgraph(write: Write) -> ir.Graph:
        def trace(op: OpBuilder) -> ir.Value:
            with scope(op, write.__name__):
                return write(op)

        outputs = [ir.Value(type=kind, shape=ir.Shape(dims))]
        return op.builder.subgraph(trace, [], outputs, name=write.__name__)

    branches = {"then_branch": subgraph(then_branch), "else_branch": subgraph(else_branch)}
    result = op.If(condition, **branches)
    result.type, result.shape = kind, ir.Shape(dims)
    return result
