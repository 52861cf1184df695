"""Positions come from the bundle's own graph: whatever it asks for, and whatever it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T

from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.errors import BundleError, PromptError
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.model import VLM
from vlmport.runtime.probe import check_golden, record_golden

WEIGHTS = toy.Weights.random()
ASKED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}]},
]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A toy whose pictures take no position at all, not to be changed."""
    folder = tmp_path_factory.mktemp("placed")
    return toy.write_bundle(folder, positions_rank=3, context=400)


@pytest.fixture
def vlm(placed: Bundle) -> VLM:
    return VLM.open(placed, threads=1)


def places(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Where the toy's tokens stand, and what the next one's place is beyond their number."""
    steps = (ids != toy.IMAGE).astype(np.int64)
    return np.cumsum(steps) - steps, int(steps.sum()) - len(ids)


def greedy(vlm: VLM, images: list[np.ndarray], messages: list, steps: int) -> list[int]:
    """In numpy: the whole sequence anew for each token, positions as the toy's graph has them."""
    pictures = [vlm.preparer.image(image) for image in images]
    text = vlm.preparer.text_ids(messages)
    ids = vlm.prompter.splice(text, [picture.prompt_ids for picture in pictures])
    embeds = WEIGHTS["embed"][ids]
    rows = [vlm.features.encoded(picture).rows for picture in pictures]
    embeds[ids == toy.IMAGE] = np.concatenate(rows)
    positions, offset = places(ids)
    tokens: list[int] = []
    for _ in range(steps):
        tokens.append(int(toy.reference_logits(WEIGHTS, embeds, positions)[-1].argmax()))
        positions = np.append(positions, len(positions) + offset)
        embeds = np.concatenate([embeds, WEIGHTS["embed"][tokens[-1:]]])
    return tokens


def test_a_prompt_of_several_pictures(vlm: VLM) -> None:
    images = [toy.picture(0), toy.picture(1, 8, 20)]
    found = vlm.generate(ASKED, images, max_new_tokens=12)
    want = greedy(vlm, images, ASKED, 12)
    assert list(found.token_ids) == want[: len(found.token_ids)]
    assert len(found.token_ids) > 4
    ids = np.array([5, toy.IMAGE, toy.IMAGE, 6])
    positions = vlm.components.position_ids(ids)
    assert positions.ids.tolist() == [[0, 1, 1, 1]] * 3
    assert positions.rope_delta == -2


def test_the_mask_and_the_pictures_are_given_only_where_they_are_asked_for(vlm: VLM) -> None:
    assert vlm.components.position_inputs == frozenset()
    picture = vlm.features.encoded(vlm.features.process(toy.picture()))
    assert picture.inputs == {}


def test_the_probe_sees_positions(placed: Bundle, tmp_path: Path) -> None:
    """The golden prompt and the steps after it stand where the graph says."""
    components = Components.open(placed, threads=1)
    golden = toy.golden()
    expected = record_golden(components, golden)
    prompt = components.process_image(toy.picture(), {}).prompt_ids
    assert places(prompt)[1] == -12
    assert check_golden(components, golden, expected).ok
    bundle = broken(placed, tmp_path, moved_later)
    report = check_golden(Components.open(bundle, threads=1), golden, expected)
    assert not report.ok


def moved_later(graph: onnx.GraphProto) -> None:
    """Steps stand five places too far."""
    node = next(one for one in graph.node if one.output[0] == "rope_delta")
    node.output[0] = "delta"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(5), "five"))
    graph.node.append(onnx.helper.make_node("Add", ["delta", "five"], ["rope_delta"]))


def wants_more(graph: onnx.GraphProto) -> None:
    graph.input.append(toy.value("cells", T.INT64, ["num_pictures", 2]))


def says_no_delta(graph: onnx.GraphProto) -> None:
    del graph.output[1]


def says_too_little(graph: onnx.GraphProto) -> None:
    """Positions of all tokens but the first."""
    node = next(one for one in graph.node if one.output[0] == "position_ids")
    node.output[0] = "all"
    one = onnx.numpy_helper.from_array(np.array([1]), "first")
    far = onnx.numpy_helper.from_array(np.array([99]), "far")
    axis = onnx.numpy_helper.from_array(np.array([2]), "last")
    graph.initializer.extend([one, far, axis])
    graph.node.append(
        onnx.helper.make_node("Slice", ["all", "first", "far", "last"], ["position_ids"])
    )


def broken(
    bundle: Bundle, folder: Path, change: Callable[[onnx.GraphProto], None] | None
) -> Bundle:
    """A copy with another position graph, or without one."""
    bundle = toy.write_bundle(folder / "toy", positions_rank=3)
    path = bundle.path("onnx/position_ids.onnx")
    if change is None:
        components = {k: v for k, v in bundle.manifest.components.items() if k != "position_ids"}
        return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, components=components))
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return bundle


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (wants_more, "position_ids: input 'cells' is not made by the image processor"),
        (says_no_delta, "position_ids: no output 'rope_delta'"),
        (says_too_little, r"positions \[3, 1, \d+\] and rope_delta \[1, 1\] for \d+ tokens"),
        (None, "takes positions on three axes, which no component gives"),
    ],
)
def test_a_graph_that_can_not_be_served_is_refused(
    placed: Bundle, tmp_path: Path, change: Callable[[onnx.GraphProto], None] | None, told: str
) -> None:
    vlm = VLM.open(broken(placed, tmp_path, change), threads=1)
    with pytest.raises(BundleError, match=told) as caught:
        vlm.caption(toy.picture())
    assert caught.value.hint


def test_without_pictures_what_is_made_of_them_is_empty(placed: Bundle, tmp_path: Path) -> None:
    def counts_cells(graph: onnx.GraphProto) -> None:
        """The cells' number is the offset."""
        wants_more(graph)
        node = next(one for one in graph.node if one.output[0] == "rope_delta")
        node.output[0] = "unused"
        graph.node.append(onnx.helper.make_node("Size", ["cells"], ["size"]))
        shape = onnx.numpy_helper.from_array(np.array([1, 1]), "one_by_one")
        graph.initializer.append(shape)
        graph.node.append(onnx.helper.make_node("Reshape", ["size", "one_by_one"], ["rope_delta"]))

    components = Components.open(broken(placed, tmp_path, counts_cells), threads=1)
    assert components.position_inputs == {"cells"}
    ids = np.array([1, 2, 3])
    assert components.position_ids(ids).rope_delta == 0
    cells = {"cells": np.array([[3, 4]]), "patches": np.zeros((12, 48))}
    assert components.position_ids(ids, [cells, cells]).rope_delta == 4
    for odd in (np.ones((1, 2), "f4"), np.ones(2, np.int64)):
        with pytest.raises(BundleError, match=r"is tensor\(int64\) \['num_pictures', 2\], the im"):
            components.position_ids(ids, [cells, {"cells": odd}])


def test_positions_of_another_rank_than_the_decoder_takes(own_bundle, tmp_path: Path) -> None:
    flat, deep = own_bundle(), toy.write_bundle(tmp_path / "deep", positions_rank=3)
    forms = {**flat.manifest.components, "position_ids": deep.manifest.components["position_ids"]}
    graph = deep.path("onnx/position_ids.onnx").read_bytes()
    flat.path("onnx/position_ids.onnx").write_bytes(graph)
    bundle = Bundle(flat.folder, dataclasses.replace(flat.manifest, components=forms))
    with raises(BundleError, "graph.run-failed", "decoder", "rank"):
        VLM.open(bundle, threads=1).caption(toy.picture())


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    vlm = VLM.open(toy.write_bundle(tmp_path, positions_rank=3, context=30), threads=1)
    with raises(PromptError, "prompt.too-long", "30"):
        vlm.caption(toy.picture(0, 40, 40))
    assert vlm.components.opened == ("image_processor",)
