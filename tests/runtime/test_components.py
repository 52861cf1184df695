"""The graphs as functions: what goes in by name, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.errors import BundleError, DeviceError, ImageError, OptionError, PromptError
from vlmport.runtime.graphs.components import Components, merge_image_features
from vlmport.runtime.graphs.decoder import Decoder

WEIGHTS = toy.Weights.random()


def test_sessions_open_at_first_use(components: Components):
    assert components.opened == ()
    components.embed(np.array([[1]]))
    assert components.opened == ("embed_tokens",)
    components.process_image(toy.picture())
    assert components.opened == ("embed_tokens", "image_processor")
    components.close()
    assert components.opened == ()
    assert components.embed(np.array([[1]])).shape == (1, 1, toy.HIDDEN)


def test_precision_names(components: Components, bundle: Bundle):
    assert components.precision == "fp32"
    assert components.choice["image_processor"] == "any"
    with raises(BundleError, "precision.not-in-bundle", "'q9'"):
        Components.open(bundle, precision="q9")
    with raises(DeviceError, "device.unknown"):
        Components.open(bundle, device="abacus")
    mixed = Components(bundle, {**components.choice, "vision_encoder": "q4"}, components.engines)
    assert mixed.precision == "vision_encoder=q4,embed_tokens=fp32,decoder_model_merged=fp32"


@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 16), (9, 23), (40, 8)])
def test_the_number_of_image_tokens_follows_the_picture(components, height: int, width: int):
    rgb = toy.picture(0, height, width)
    processed = components.process_image(rgb)
    count = (height // 4) * (width // 4)
    want = [toy.START, *[toy.IMAGE] * count, toy.END]
    assert processed.prompt_ids.tolist() == want
    assert processed.prompt_ids.dtype == np.int64
    assert list(processed.inputs) == ["patches"]
    features = components.encode_image(processed.inputs)
    np.testing.assert_allclose(features, processed.inputs["patches"] @ WEIGHTS["vision"], atol=1e-5)
    corner = rgb[:4, :4].reshape(-1) / np.float32(255)
    np.testing.assert_allclose(processed.inputs["patches"][0], corner, rtol=1e-6)


@pytest.mark.parametrize("by", [-3, 3])
def test_a_vocabulary_of_another_size_than_the_manifest_says(bundle: Bundle, by: int):
    dims = dataclasses.replace(bundle.manifest.dims, vocab_size=toy.VOCAB + by)
    wrong = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, dims=dims))
    with raises(BundleError, "bundle.wrong-graph", f"{toy.VOCAB} tokens", toy.VOCAB + by):
        _ = Components.open(wrong, threads=1).decoder


def test_an_image_processor_without_prompt_ids(own_bundle):
    bundle = own_bundle()
    path = bundle.path("onnx/image_processor.onnx")
    graph = onnx.load(path)
    graph.graph.output.pop()
    onnx.save(graph, path)
    with raises(BundleError, "bundle.wrong-graph", "image_processor", "'prompt_ids'"):
        Components.open(bundle, threads=1).process_image(toy.picture())


def test_pictures_need_not_be_contiguous(components: Components):
    rgb = toy.picture(0, 12, 16)
    flipped = components.process_image(rgb[:, ::-1]).inputs["patches"]
    np.testing.assert_array_equal(
        flipped, components.process_image(np.ascontiguousarray(rgb[:, ::-1])).inputs["patches"]
    )


def test_image_options_are_inputs_of_the_graph(components: Components):
    plain = components.process_image(toy.picture()).inputs["patches"]
    doubled = components.process_image(toy.picture(), {"gain": 2}).inputs["patches"]
    np.testing.assert_allclose(doubled, plain * 2)
    with raises(OptionError, "option.unknown", "'gian'", "'gain'") as caught:
        components.process_image(toy.picture(), {"gian": 2})
    assert "image options: gain" in caught.value.hint
    with raises(OptionError, "option.unknown", "'image'"):
        components.process_image(toy.picture(), {"image": 2})
    with raises(OptionError, "option.wrong-value", "gain='a lot'"):
        components.process_image(toy.picture(), {"gain": "a lot"})


def test_a_picture_that_the_graph_refuses(components: Components):
    with raises(ImageError, "image.refused", "3x2") as caught:
        components.process_image(np.zeros((2, 3, 4), np.uint8))
    assert "\n" not in str(caught.value)


def test_an_encoder_input_that_nobody_makes(components: Components):
    with raises(BundleError, "bundle.wrong-graph", "'patches'"):
        components.encode_image({"pixel_values": np.zeros((1, 48), "f4")})


def test_a_run_that_fails_is_one_line(components: Components):
    with raises(BundleError, "graph.run-failed", "vision_encoder") as caught:
        components.encode_image({"patches": np.zeros((2, 5), "f4")})
    assert "\n" not in str(caught.value)
    assert "--probe" in caught.value.hint


def test_a_decoder_without_the_inputs_that_it_needs(bundle: Bundle):
    session = Components.open(bundle).session("embed_tokens")
    with raises(BundleError, "bundle.wrong-graph", "inputs_embeds", "input_ids → inputs_embeds"):
        Decoder.of(session, bundle.manifest.cache, "decoder")


def test_further_outputs_of_the_processor_are_left_out(components: Components):
    inputs = dict(components.process_image(toy.picture()).inputs)
    want = components.encode_image(inputs)
    got = components.encode_image({**inputs, "grid": np.array([1])})
    np.testing.assert_array_equal(got, want)


def test_embedding(components: Components):
    ids = np.array([[1, 2], [115, 0]], np.int32)
    np.testing.assert_array_equal(components.embed(ids), WEIGHTS["embed"][ids])
    for wrong in (len(WEIGHTS["embed"]), 999, -1, 2**40):
        with raises(PromptError, "prompt.token-past-embedding", f"token {wrong} ") as caught:
            components.embed(np.array([[1, wrong]]))
        assert caught.value.code == "prompt.token-past-embedding"


def test_positions_count_from_zero(components: Components):
    found = components.position_ids(np.array([5, 6, 7]))
    assert (found.ids.tolist(), found.rope_delta) == ([0, 1, 2], 0)
    assert components.position_inputs == frozenset()


def test_no_rows_of_any_width_change_nothing():
    """A prompt without a picture in a bundle whose features are wider than a caller knows."""
    embeds = np.ones((2, 12), np.float32)
    none = np.zeros((0, 4), np.float32)
    merged = merge_image_features(embeds, np.array([1, 2]), none, toy.IMAGE)
    np.testing.assert_array_equal(merged, embeds)
    assert merged is not embeds


def test_the_plain_form_grows_and_equals_a_full_pass(components: Components):
    embeds = WEIGHTS["embed"][np.arange(2, 14)]
    full = toy.reference_logits(WEIGHTS, embeds)
    past = None
    for start, stop in ((0, 5), (5, 11), (11, 12)):
        logits, past = components.decode(
            embeds[None, start:stop],
            np.ones((1, stop), np.int64),
            np.arange(start, stop)[None],
            past,
        )
        np.testing.assert_allclose(logits[0], full[start:stop], atol=2e-3)
        assert {array.shape for array in past.values()} == {(1, toy.KV_HEADS, stop, toy.HEAD_DIM)}
        assert set(past) == {port.past for port in components.decoder.ports}
    logits, _ = components.decode(
        embeds[None], np.ones((1, 12)), np.arange(12)[None], None, num_logits_to_keep=2
    )
    np.testing.assert_allclose(logits[0], full[-2:], atol=2e-3)


def test_a_cache_that_does_not_grow_is_refused(components: Components):
    """A buffer longer than the mask is the bound form: here nothing may come back of its size."""
    past = {port.past: port.empty(1, 30) for port in components.decoder.ports}
    embeds = WEIGHTS["embed"][np.arange(3)][None]
    with raises(BundleError, "bundle.wrong-graph", "30", "30", "3"):
        components.decode(embeds, np.ones((1, 3)), np.arange(3)[None], past)


@given(data=st.data())
def test_merging(data: st.DataObject):
    ids = np.array(data.draw(st.lists(st.integers(0, 3), max_size=12)), np.int64)
    rng = np.random.default_rng(len(ids))
    embeds = rng.standard_normal((len(ids), 4)).astype("f4")
    before = embeds.copy()
    features = rng.standard_normal((int((ids == 2).sum()), 4)).astype("f4")
    merged = merge_image_features(embeds, ids, features, 2)
    np.testing.assert_array_equal(embeds, before)
    np.testing.assert_array_equal(merged[ids == 2], features)
    np.testing.assert_array_equal(merged[ids != 2], embeds[ids != 2])


@pytest.mark.parametrize("features", [0, 1, 3])
def test_merging_another_number(features: int):
    ids = np.array([1, 2, 2, 1])
    with raises(PromptError, "prompt.wrong-features", "2 image tokens", f"{features} features"):
        merge_image_features(np.zeros((4, 8), "f4"), ids, np.zeros((features, 8), "f4"), 2)


def test_merging_another_width():
    with raises(PromptError, "prompt.wrong-features", "6", "8"):
        merge_image_features(np.zeros((1, 8), "f4"), np.array([2]), np.zeros((1, 6), "f4"), 2)
