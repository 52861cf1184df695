"""A graph that refuses its input, and says why.

ONNX has no operator that raises. But a Gather past the end of a tensor fails in ONNX Runtime, and
the message of a failed node holds the node's name: so the name is the reason. Any client of the
graph reads it, and one that knows the prefix reads nothing else (runtime/graphs/sessions.py).

Trap: a GPU's Gather may not look at its indices. Refuse what else would go wrong silently in
image_processor and position_ids, which always run on the CPU; in other graphs see to it that what
follows fails too.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

PREFIX = "refused: "  # read by runtime/graphs/sessions.py
BETWEEN = " | "  # the reason and the hint


def refuse(op: OpBuilder, value: ir.Value, when: ir.Value, reason: str, hint: str) -> ir.Value:
    """`value` itself, or a failed run where the condition holds.

    Args:
        value: any tensor; what is computed from the result is what the condition protects.
        when: bool, one element.
        reason: what is wrong, such as 'min_pixels is more than max_pixels'.
        hint: what to do next.
    """
    index = op.Cast(op.Reshape(when, [1]), to=ir.DataType.INT64)
    zero = op.Gather(op.Constant(value_ints=[0]), index)
    node = zero.producer()
    assert node is not None
    node.name = f"{PREFIX}{reason}{BETWEEN}{hint}"
    return op.Gather(op.Unsqueeze(value, [0]), op.Squeeze(zero, [0]), axis=0)
