"""A graph that refuses its input, and what the runtime makes of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from vlmport.graph.builder import OpBuilder, add_output, new_graph, to_model
from vlmport.graph.refusal import refuse
from vlmport.runtime.graphs.sessions import open_session, refusal

INT64 = ir.DataType.INT64


def write(op: OpBuilder, x: ir.Value) -> ir.Value:
    is_large = op.Greater(op.ReduceMax(x, keepdims=1), 5)
    return refuse(op, x, is_large, "it's more than 5: see 'x'", "take less")


def test_a_refusal_is_read_from_the_name_of_the_node(tmp_path: Path) -> None:
    builder = new_graph("refusing")
    x = builder.input("x", INT64, ["n"])
    add_output(builder, write(builder.op, x), "y", INT64, ["n"])
    ir.save(to_model(builder), tmp_path / "graph.onnx")
    session = open_session(tmp_path / "graph.onnx")
    kept = session.run(None, {"x": np.array([1, 5])})[0]
    np.testing.assert_array_equal(kept, [1, 5])
    with pytest.raises(Exception, match="refused") as caught:
        session.run(None, {"x": np.array([1, 6])})
    assert refusal(caught.value) == ("it's more than 5: see 'x'", "take less")


def test_other_errors_are_no_refusals() -> None:
    assert (
        refusal(ValueError("Non-zero status code. Name:'Gather_3' Status Message: idx=9")) is None
    )
