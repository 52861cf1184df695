"""What a decoder's graph says of its inputs and outputs, and what is refused before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.toy_decoder import CACHE, HEAD_DIM, KV_HEADS
from vlmport.bundle import Bundle, CacheLayout
from vlmport.errors import BundleError
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.decoder import MAX_VOCABULARY, CachePort, Decoder, scales_by_call


def port(name: str, shape: Sequence[Any], kind: str = "float") -> SimpleNamespace:
    return SimpleNamespace(name=name, shape=shape, type=f"tensor({kind})")


def session(**changes: SimpleNamespace | None) -> Any:
    """What a session says of a decoder with one cache tensor; None leaves a port out."""
    ports = {
        "inputs_embeds": port("inputs_embeds", ["B", "S", 8]),
        "attention_mask": port("attention_mask", ["B", "T"], "int64"),
        "past": port("old.k", ["B", 2, "P", 4]),
        "logits": port("logits", ["B", "S", 50]),
        "present": port("new.k", ["B", 2, "T", 4]),
        "position_ids": None,
    } | changes
    there = {name: one for name, one in ports.items() if one is not None}
    outputs = [one for name, one in there.items() if name in ("logits", "present")]
    inputs = [one for one in there.values() if one not in outputs]
    return SimpleNamespace(get_inputs=lambda: inputs, get_outputs=lambda: outputs)


def of(**changes: SimpleNamespace | None) -> Decoder:
    return Decoder.of(session(**changes), CACHE, "onnx/decoder.onnx")


def test_what_a_graph_says() -> None:
    decoder = of()
    assert decoder.ports == (CachePort("old.k", "new.k", 2, 4, np.dtype(np.float32)),)
    assert decoder.inputs == {"inputs_embeds", "attention_mask", "old.k"}
    assert (decoder.vocab_size, decoder.logits_dtype) == (50, np.float32)
    assert (decoder.positions_rank, decoder.row_by_row) == (2, False)


def test_types_are_those_of_the_graph() -> None:
    half = {
        "past": port("old.k", ["B", 2, "P", 4], "float16"),
        "logits": port("logits", ["B", "S", 50], "float16"),
    }
    decoder = of(**half)
    assert decoder.logits_dtype == np.float16
    assert decoder.ports[0].empty(3, 7).dtype == np.float16


@pytest.mark.parametrize(
    ("shape", "rank"), [(["B", "S"], 2), ([3, "B", "S"], 3)], ids=["one axis", "three axes"]
)
def test_positions(shape: list[Any], rank: int) -> None:
    assert of(position_ids=port("position_ids", shape, "int64")).positions_rank == rank


@pytest.mark.parametrize("name", ["inputs_embeds", "attention_mask", "logits"])
def test_what_every_decoder_has(name: str) -> None:
    with raises(BundleError, "bundle.wrong-graph", "onnx/decoder.onnx", name):
        of(**{name: None})


def test_a_type_that_numpy_has_not() -> None:
    with raises(BundleError, "bundle.wrong-graph", "old.k", "tensor(bfloat16)"):
        of(past=port("old.k", ["B", 2, "P", 4], "bfloat16"))


def test_the_cache_begins_empty_and_zero() -> None:
    empty = CachePort("old.k", "new.k", 2, 4, np.dtype(np.float32)).empty(3, 5)
    assert empty.shape == (3, 2, 5, 4)
    assert not empty.any()
    assert CachePort("old.k", "new.k", 2, 4, np.dtype(np.float32)).empty(1).shape == (1, 2, 0, 4)


def test_names_are_paired_not_counted(components: Components) -> None:
    """The toy declares its inputs in another order than its outputs."""
    for one in components.decoder.ports:
        assert one.present == one.past.replace("old.", "new.")
        assert (one.heads, one.head_dim) == (KV_HEADS, HEAD_DIM)
    inputs = [one.name for one in components.decoder.session.get_inputs()]
    assert inputs[0] == "old.1.v"


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (CacheLayout("past_key_values.", "present."), "'past_key_values.'"),
        (CacheLayout("old.", "new.0"), "old.0"),
        (CacheLayout("old.0.", "new."), "new.0.k"),
    ],
)
def test_cache_tensors_without_a_partner(
    components: Components, layout: CacheLayout, names: str
) -> None:
    with raises(BundleError, "bundle.wrong-graph", "decoder", names):
        Decoder.of(components.decoder.session, layout, "decoder")


ODD_SHAPES: list[list[Any]] = [[], ["B", 2, "T"], ["B", "H", "P", 0], ["B", 2, "P", 2**40]]


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("name", ["past", "logits"])
def test_shapes_that_no_cache_can_have(name: str, shape: list[Any]) -> None:
    """A hostile graph may leave them out, or claim terabytes."""
    changed = {name: port("old.k" if name == "past" else name, shape)}
    with pytest.raises(BundleError) as caught:
        of(**changed)
    assert caught.value.code == "bundle.wrong-shape"


def test_the_largest_vocabulary() -> None:
    largest = port("logits", ["B", "S", MAX_VOCABULARY])
    assert of(logits=largest).vocab_size == MAX_VOCABULARY
    with raises(BundleError, "bundle.wrong-shape", MAX_VOCABULARY):
        of(logits=port("logits", ["B", "S", MAX_VOCABULARY + 1]))


def write_graph(path: Path, operator: str) -> Path:
    outputs = ["y", "scale", "zero_point"] if operator == "DynamicQuantizeLinear" else ["y"]
    node = h.make_node(operator, ["x"], outputs)
    graph = h.make_graph([node], "graph", [], [])
    onnx.save(h.make_model(graph), path)
    return path


def test_a_graph_that_scales_all_rows_by_one_number_is_known_by_its_operator(
    tmp_path: Path, bundle: Bundle
) -> None:
    assert scales_by_call(write_graph(tmp_path / "8-bit.onnx", "DynamicQuantizeLinear"))
    assert not scales_by_call(write_graph(tmp_path / "float.onnx", "MatMul"))
    assert not scales_by_call(bundle.path("onnx/decoder_model_merged.onnx"))


def test_the_toys_in_half_precision(tmp_path: Path) -> None:
    """What ONNX Runtime itself says of a graph is read as what stands for it above."""
    bundle = toy.write_bundle(tmp_path, cache_dtype=T.FLOAT16, positions_rank=3)
    decoder = Components.open(bundle, threads=1).decoder
    assert {one.dtype for one in decoder.ports} == {np.dtype(np.float16)}
    assert (decoder.vocab_size, decoder.positions_rank) == (toy.VOCAB, 3)
    assert "num_logits_to_keep" in decoder.inputs
