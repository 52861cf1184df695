"""Let a graph refuse its input with a reason.

ONNX has no operator that raises. But a Gather past the end of a tensor fails in ONNX Runtime, and
the message of a failed node holds the node's name: so the name is the reason. Any client of the
graph reads it, and one that knows the prefix reads nothing else (runtime/graphs/sessions.py).

Traps:
- A GPU's Gather may not check its indices. So refuse input in image_processor and position_ids,
  which always run on the CPU; in other graphs, make sure that the next operator fails too.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

PREFIX = "refused: "  # read by runtime/graphs/sessions.py
BETWEEN = " | "  # the reason and the hint


def refuse(op: OpBuilder, value: ir.Value, when: ir.Value, reason: str, hint: str) -> ir.Value:
    """Return `value`, or let the run fail if the condition holds.

    Args:
        value: any tensor; the condition protects everything that is computed from the result.
        when: bool, one element.
        reason: the fault, such as 'min_pixels is more than max_pixels'.
        hint: what to do next.
    """
    index = op.Cast(op.Reshape(when, [1]), to=ir.DataType.INT64)
    zero = op.Gather(op.Constant(value_ints=[0]), index)
    node = zero.producer()
    assert node is not None
    node.name = f"{PREFIX}{reason}{BETWEEN}{hint}"
    return op.Gather(op.Unsqueeze(value, [0]), op.Squeeze(zero, [0]), axis=0)
