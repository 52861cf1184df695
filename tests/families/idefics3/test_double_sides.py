"""Sides as Python's doubles give them, from a graph without a double in it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.families.idefics3.double_sides import other_side
from vlmport.graph.builder import add_output, new_graph, to_model

INT64 = ir.DataType.INT64


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    builder = new_graph("sides")
    inputs = [builder.input(name, INT64, [1]) for name in ("length", "width", "height")]
    add_output(builder, other_side(builder.op, *inputs), "side", INT64, [1])
    proto = ir.to_proto(to_model(builder))
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def from_graph(session: ort.InferenceSession, length: int, width: int, height: int) -> int:
    sizes = {"length": length, "width": width, "height": height}
    return int(session.run(None, {name: np.array([value]) for name, value in sizes.items()})[0][0])


def from_python(length: int, width: int, height: int) -> int:
    ratio = width / height
    return int(length / ratio) if width >= height else int(length * ratio)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 65_536), st.integers(1, 65_536))
def test_any_sides(session: ort.InferenceSession, length: int, width: int, height: int) -> None:
    assert from_graph(session, length, width, height) == from_python(length, width, height)


@pytest.mark.parametrize("length", [2048, 1456, 97, 4096])
def test_whole_sides_that_doubles_miss(session: ort.InferenceSession, length: int) -> None:
    """Pictures whose other side is a whole number k exactly: only there do doubles matter, and in
    a fair share of them the result is k - 1."""
    missed = 0
    for k in range(1, length + 1, 3):
        common = math.gcd(length, k)
        for many in (1, 3, 7):
            long, short = length // common * many, k // common * many
            for width, height in ((long, short), (short, long)):
                expected = from_python(length, width, height)
                missed += expected != k
                assert from_graph(session, length, width, height) == expected, (width, height)
    assert missed > 10


@pytest.mark.parametrize(("width", "height"), [(1, 90_000_000), (90_000_000, 1), (1, 1)])
def test_the_narrowest(session: ort.InferenceSession, width: int, height: int) -> None:
    assert from_graph(session, 2048, width, height) == from_python(2048, width, height)
