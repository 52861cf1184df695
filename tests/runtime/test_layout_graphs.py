"""The graphs of a layout as functions: which are opened, what they may lack, what they refuse."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.toy_decoder import KV_HEADS, LAYERS
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import HUB
from vlmport.errors import BundleError, PromptError
from vlmport.runtime.layouts.base import LayoutGraphs

EMBED, DECODER = "embed_tokens", "decoder_model_merged"


class Graphs(LayoutGraphs):
    """The toy's, as if the Hub's layout were one of those that the runtime does not run."""

    layout = HUB
    outputs: ClassVar = {
        EMBED: "inputs_embeds",
        DECODER: "logits",
        "image_processor": "prompt_ids",
    }


@pytest.fixture
def graphs(bundle: Bundle) -> Graphs:
    return Graphs.open(bundle)


def empty_cache() -> dict[str, np.ndarray]:
    shape = (1, KV_HEADS, 0, toy.HEAD_DIM)
    return {f"old.{i}.{kind}": np.zeros(shape, "f4") for i in range(LAYERS) for kind in "kv"}


def decode(graphs: Graphs, embeds: np.ndarray, cache: dict[str, np.ndarray]) -> dict:
    past = next(iter(cache.values())).shape[2]
    return graphs.run(
        DECODER,
        {
            "inputs_embeds": embeds[None],
            "attention_mask": np.ones((1, past + len(embeds)), np.int64),
            "position_ids": np.arange(past, past + len(embeds))[None],
            "num_logits_to_keep": np.array(1),
            **cache,
        },
    )


def test_the_cache_comes_back_under_the_names_that_it_is_fed_under(graphs: Graphs) -> None:
    """Two calls equal one."""
    embeds = toy.Weights.random()["embed"][np.array([5, 6, 7, 8])]
    whole = decode(graphs, embeds, empty_cache())
    cache = graphs.presents(DECODER, decode(graphs, embeds[:3], empty_cache()))
    assert set(cache) == set(empty_cache())
    step = decode(graphs, embeds[3:], cache)
    np.testing.assert_allclose(step["logits"], whole["logits"], atol=1e-4)
    reference = toy.reference_logits(toy.Weights.random(), embeds)[-1]
    np.testing.assert_allclose(step["logits"][0, -1], reference, atol=2e-3)


def test_outputs_have_their_own_names(graphs: Graphs) -> None:
    found = graphs.run("image_processor", {"image": toy.picture(), "gain": np.array(1, "f4")})
    assert {name: value.shape for name, value in found.items()} == {
        "patches": (12, 48),
        "prompt_ids": (14,),
    }


def test_what_was_chosen(bundle: Bundle, graphs: Graphs) -> None:
    assert graphs.precision == "fp32"
    assert graphs.manifest is bundle.manifest
    assert graphs.path(EMBED) == bundle.folder / "onnx/embed_tokens.onnx"
    with raises(BundleError, "precision.not-in-bundle", "q4"):
        Graphs.open(bundle, precision="q4")


def test_another_layout_is_refused(bundle: Bundle) -> None:
    class Others(Graphs):
        layout = "fused"

    with raises(BundleError, "bundle.other-layout", "'hub'", "'fused'"):
        Others.open(bundle)


def test_sessions_are_opened_once_until_they_are_released(graphs: Graphs) -> None:
    first, second = graphs.session(EMBED), graphs.session(DECODER)
    assert graphs.session(EMBED) is first
    graphs.release(EMBED)
    graphs.release(EMBED)  # nothing is there
    assert graphs.session(EMBED) is not first
    assert graphs.session(DECODER) is second
    graphs.close()
    assert graphs.session(DECODER) is not second


@pytest.mark.parametrize("ids", [[[0, toy.VOCAB + 2]], [[]]], ids=["all", "none"])
def test_ids_that_have_an_embedding(graphs: Graphs, ids: list[list[int]]) -> None:
    checked = graphs.checked(np.array(ids, np.int32), EMBED)
    assert checked.dtype == np.int64
    assert checked.tolist() == ids


@pytest.mark.parametrize("wrong", [-1, toy.VOCAB + 3])
def test_ids_that_have_none(graphs: Graphs, wrong: int) -> None:
    with raises(PromptError, "prompt.token-past-embedding", wrong) as caught:
        graphs.checked(np.array([[5, wrong]]), EMBED)
    assert caught.value.code == "prompt.token-past-embedding"


def test_a_graph_that_fails_says_which(graphs: Graphs) -> None:
    with raises(BundleError, "graph.run-failed", "embed_tokens") as caught:
        graphs.run(EMBED, {"input_ids": np.array([[10**6]])})
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_graph_that_refuses_says_why(graphs: Graphs) -> None:
    node = h.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])
    node.name = "refused: an odd number | give an even one"
    ids = h.make_tensor_value_info("input_ids", T.INT64, ["n"])
    out = h.make_tensor_value_info("inputs_embeds", T.FLOAT, ["n"])
    table = onnx.numpy_helper.from_array(np.zeros(4, "f4"), "table")
    graph = h.make_graph([node], "refusing", [ids], [out], [table])
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=10)
    graphs._sessions[EMBED] = ort.InferenceSession(made.SerializeToString())
    with pytest.raises(PromptError, match=r"^embed_tokens: an odd number$") as caught:
        graphs.run(EMBED, {"input_ids": np.array([9])})
    assert caught.value.hint == "give an even one"
    assert graphs.run(EMBED, {"input_ids": np.array([3])})["inputs_embeds"].tolist() == [0]


def test_an_output_that_is_not_there(bundle: Bundle) -> None:
    class Wanting(Graphs):
        outputs: ClassVar = {EMBED: "hidden_states"}

    with raises(BundleError, "bundle.wrong-graph", "'hidden_states'", "inputs_embeds"):
        Wanting.open(bundle).run(EMBED, {"input_ids": np.array([[1]])})


def test_a_decoder_without_a_cache(graphs: Graphs) -> None:
    with raises(BundleError, "bundle.wrong-graph", "'new.…'"):
        graphs.presents(DECODER, {"logits": np.zeros(1)})
