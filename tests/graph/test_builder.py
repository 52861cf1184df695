"""The builder of graphs: each operator's signature is read once, and checked for every node."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from vlmport.graph import builder as builders
from vlmport.graph.builder import new_graph


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forget the signatures; list the operators whose signature is read."""
    names: list[str] = []
    plain = ir.schemas.OpSignature.from_op_schema

    def counted(schema: object) -> ir.schemas.OpSignature:
        names.append(getattr(schema, "name", ""))
        return plain(schema)  # type: ignore[arg-type]

    monkeypatch.setattr(builders, "_signatures", {})
    monkeypatch.setattr(ir.schemas.OpSignature, "from_op_schema", staticmethod(counted))
    return names


def test_a_signature_is_read_once(read: list[str]) -> None:
    graph = new_graph("a")
    value = graph.input("x", ir.DataType.FLOAT, ["n", 2])
    for _ in range(3):
        value = graph.op.Softmax(graph.op.Add(value, value), axis=1)
    assert sorted(read) == ["Add", "Softmax"]
    nodes = list(graph.graph)
    assert [node.op_type for node in nodes] == ["Add", "Softmax"] * 3
    assert [node.attributes.get_int("axis", 0) for node in nodes] == [0, 1] * 3
    assert new_graph("b").op.Add(value, value) is not None
    assert len(read) == 2  # for all graphs


def test_wrong_arguments_are_still_refused(read: list[str]) -> None:
    graph = new_graph("a")
    value = graph.input("x", ir.DataType.FLOAT, ["n"])
    graph.op.Relu(value)
    with pytest.raises(TypeError, match="alpha"):
        graph.op.Relu(value, alpha=1.0)
    with pytest.raises(TypeError):
        graph.op.Relu(value, value)
    assert read == ["Relu"]
