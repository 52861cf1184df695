"""Write subgraphs: one of two branches, or steps over one value.

Their names differ from all names outside, as ONNX requires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

__all__ = ["fold", "if_else", "scope", "unique_name"]

Write = Callable[[OpBuilder], ir.Value]
Fold = Callable[[OpBuilder, ir.Value, ir.Value], ir.Value]


@contextmanager
def scope(op: OpBuilder, name: str) -> Iterator[None]:
    """Prefix the names of everything written within."""
    op.builder.push_module(name)
    try:
        yield
    finally:
        op.builder.pop_module()


def unique_name(op: OpBuilder, name: str) -> str:
    """Make a name that no other call has, from the number of nodes in this and outer graphs."""
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
    """Write a choice between two branches: a tensor of this type and rank.

    Args:
        condition: bool, one element.
        then_branch, else_branch: functions that write a branch; they may use values of the graph
            around it. Their names become those of the branches, so they must differ.
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


def fold(
    op: OpBuilder, steps: ir.Value, body: Fold, first: ir.Value, dtype: ir.DataType, rank: int
) -> ir.Value:
    """Write a loop that applies `body` to a value `steps` times, beginning with `first`.

    Args:
        steps: i64, one element.
        body: a function that writes a step, from its number i64 [] and the value so far; it may use
            values of the graph around it. The value keeps its type and rank; its dims may change.
    """
    flag, index = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.INT64)
    kind, dims = ir.TensorType(dtype), [None] * rank

    def trace(
        op: OpBuilder, step: ir.Value, condition: ir.Value, value: ir.Value
    ) -> list[ir.Value]:
        with scope(op, body.__name__):
            return [op.Identity(condition), body(op, step, value)]

    inputs = [
        ir.Value(name=unique_name(op, "step"), type=index, shape=ir.Shape([])),
        ir.Value(name=unique_name(op, "condition"), type=flag, shape=ir.Shape([])),
        ir.Value(name=unique_name(op, "value"), type=kind, shape=ir.Shape(dims)),
    ]
    outputs = [
        ir.Value(type=flag, shape=ir.Shape([])),
        ir.Value(type=kind, shape=ir.Shape(dims)),
    ]
    graph = op.builder.subgraph(trace, inputs, outputs, name=body.__name__)
    result = op.Loop(steps, None, first, body=graph)
    result.type, result.shape = kind, ir.Shape(dims)
    return result
