"""Whatever bytes stand where captions or a graph should: an error of ours, or a right result."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vlmport.errors import BundleError, EvaluationError
from vlmport.evaluation.captions import read_captions
from vlmport.files.onnx_file import read_onnx

ANY_FILE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["images", "annotations", "id", "image_id", "file_name", "caption"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def captions(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with contextlib.suppress(EvaluationError):
        found = read_captions(path)
        assert found
        assert all(name and texts and all(texts) for name, texts in found.items())


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
@ANY_FILE
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_captions_of_any_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    captions(tmp_path / name, content)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@ANY_FILE
@given(value=JSON)
def test_captions_of_any_json(tmp_path: Path, name: str, value: object) -> None:
    captions(tmp_path / name, json.dumps(value).encode())


@ANY_FILE
@given(
    header=st.lists(st.sampled_from(["file_name", "text", "caption", "x"]), max_size=4),
    rows=st.lists(st.lists(st.text(max_size=5), max_size=4), max_size=4),
)
def test_captions_of_any_table(tmp_path: Path, header: list[str], rows: list[list[str]]) -> None:
    captions(tmp_path / "x.csv", "\n".join(",".join(row) for row in [header, *rows]).encode())


def model() -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    return helper.make_model(graph, producer_name="test").SerializeToString()


WHOLE = model()


def graph_of(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with contextlib.suppress(BundleError):
        read_onnx(path).check()
        onnx.ModelProto.FromString(content)  # what is shown is what onnx reads


@ANY_FILE
@given(content=st.binary(max_size=80))
def test_a_graph_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    graph_of(tmp_path / "x.onnx", content)


@ANY_FILE
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    end=st.integers(1, len(WHOLE)),
)
def test_a_graph_with_changed_bytes(
    tmp_path: Path, changes: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(WHOLE)
    for at, byte in changes:
        content[at] = byte
    graph_of(tmp_path / "x.onnx", bytes(content[:end]))
    graph_of(tmp_path / "x.onnx", bytes(content))
