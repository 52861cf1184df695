"""The positions graph equals transformers' get_rope_index, that of both models, for any prompt."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from tests.graph.running import open_graph
from tests.thorough import examples
from vlmport.graph.mrope import axes_of_frequencies, position_ids_graph
from vlmport.runtime.graphs.sessions import refusal

IMAGE, PAD = 99, 0
MODELS: dict[str, Any] = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}

Grid = tuple[int, int, int]  # in merged patches
Part = int | Grid  # so many words, or a picture


@functools.cache
def graph(merge: int) -> ort.InferenceSession:
    return open_graph(position_ids_graph(IMAGE, merge), {})


def ours(
    ids: np.ndarray, mask: np.ndarray, grids: np.ndarray, merge: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    feeds = {"input_ids": ids, "attention_mask": mask, "image_grid_thw": grids}
    positions, delta = map(np.asarray, graph(merge).run(["position_ids", "rope_delta"], feeds))
    return positions, delta


def theirs(
    model: Any, ids: np.ndarray, mask: np.ndarray, grids: np.ndarray, merge: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    vision = SimpleNamespace(spatial_merge_size=merge, tokens_per_second=2)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.get_vision_position_ids = functools.partial(model.get_vision_position_ids, stand_in)
    kinds = torch.from_numpy((ids == IMAGE).astype(np.int32))
    positions, delta = model.get_rope_index(
        stand_in,
        input_ids=torch.from_numpy(ids),
        mm_token_type_ids=kinds,
        image_grid_thw=torch.from_numpy(grids),
        attention_mask=torch.from_numpy(mask),
    )
    return positions.numpy(), delta.numpy()


def row_of(parts: list[Part]) -> list[int]:
    """Word ids are 1, 2, …; a picture's all IMAGE."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += [1 + len(ids) % 50 for _ in range(part)]
        else:
            ids += [IMAGE] * (part[0] * part[1] * part[2])
    return ids


def grids_of(rows: list[list[Part]], merge: int = 2) -> np.ndarray:
    """i64[I, 3], in patches."""
    grids = [part for row in rows for part in row if not isinstance(part, int)]
    return np.array(grids, np.int64).reshape(-1, 3) * np.array([1, merge, merge])


def one_row(parts: list[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.array([row_of(parts)])
    return ids, np.ones_like(ids), grids_of([parts])


def test_the_worked_example() -> None:
    positions, delta = ours(*one_row([4, (1, 2, 3), 3]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8, 9],
        [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9],
    ]
    assert delta.tolist() == [[-3]]


def test_text_alone_is_counted() -> None:
    """Its delta is 0."""
    ids = np.array([[5, 6, 7, 8, 9], [PAD, PAD, 7, 8, 9]])
    mask = (ids != PAD).astype(np.int64)
    positions, delta = ours(ids, mask, np.zeros((0, 3), np.int64))
    assert positions.shape == (3, 2, 5)
    assert (positions == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]).all()
    assert delta.tolist() == [[0], [0]]


sides = st.integers(1, 4)
pictures = st.tuples(st.just(1), sides, sides)
# transformers takes pictures with nothing between them for one.
rows = st.lists(
    st.tuples(pictures, st.integers(1, 4)), max_size=3
).flatmap(
    lambda pairs: st.tuples(st.integers(0, 4), st.booleans()).map(
        lambda ends: [
            *([ends[0]] if ends[0] or not pairs else []),
            *[part for pair in pairs for part in pair][: -1 if ends[1] and pairs else None],
        ]
    )
).filter(lambda row: row_of(row) != [])  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@given(
    batch=st.lists(rows, min_size=1, max_size=4),
    merge=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
@examples(200)
def test_equals_transformers(model: Any, batch: list[list[Part]], merge: int, seed: int) -> None:
    """Rows of unequal length, padded on the left, on the right and within, with ids of any kind."""
    rng = np.random.default_rng(seed)
    length = max(len(row_of(row)) for row in batch) + int(rng.integers(0, 3))
    ids = rng.choice([PAD, 7, IMAGE], (len(batch), length))
    mask = np.zeros((len(batch), length), np.int64)
    for b, row in enumerate(batch):
        own = row_of(row)
        at = np.sort(rng.permutation(length)[: len(own)])
        if kind := rng.integers(0, 3):
            at = np.arange(len(own)) + (length - len(own)) * (kind == 1)
        ids[b, at], mask[b, at] = own, 1
    grids = grids_of(batch, merge)
    truth = theirs(model, ids, mask, grids, merge)
    for got, expected in zip(ours(ids, mask, grids, merge), truth, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_several_frames_equal_transformers(model: Any) -> None:
    """A picture of two and more frames is counted along time too, and takes no more for it."""
    feeds = one_row([2, (3, 2, 1), 1, (2, 1, 2)])
    for got, expected in zip(ours(*feeds), theirs(model, *feeds), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_comparison_can_fail(model: Any) -> None:
    ids, mask, grids = one_row([2, (1, 2, 3), 2])
    truth, _ = theirs(model, ids, mask, grids)
    assert not np.array_equal(ours(ids, mask, grids[:, [0, 2, 1]])[0], truth)


def test_pictures_with_nothing_between_them_are_two() -> None:
    """transformers makes one group of them, with the grid of the first, and fails."""
    feeds = one_row([1, (1, 1, 2), (1, 2, 1), 1])
    with pytest.raises(RuntimeError):
        theirs(Qwen3VLModel, *feeds)
    positions, delta = ours(*feeds)
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 3, 3, 5],
        [0, 1, 1, 3, 4, 5],
        [0, 1, 2, 3, 3, 5],
    ]
    assert delta.tolist() == [[0]]


@given(parts=rows, more=rows)
@settings(max_examples=50, deadline=None)
def test_a_conversation_goes_on_where_it_was(parts: list[Part], more: list[Part]) -> None:
    """What was prefilled keeps its positions; new tokens stand at their number plus the delta."""
    parts = [*parts, 1]  # the end of a turn
    before, delta = ours(*one_row(parts))
    whole, _ = ours(*one_row([*parts, *more]))
    P = before.shape[2]
    np.testing.assert_array_equal(whole[:, :, :P], before)
    answered, _ = ours(*one_row([*parts, 3]))
    expected = np.arange(P, P + 3) + delta[0, 0]
    np.testing.assert_array_equal(answered[:, 0, P:], np.tile(expected, (3, 1)))


REFUSED = {
    "fewer tokens than the grid says": ([[1, IMAGE, IMAGE]], [[1, 4, 6]], "do not match"),
    "a grid too many": ([[1, 2]], [[1, 2, 2]], "do not match"),
    "no grid": ([[1, IMAGE]], np.zeros((0, 3), np.int64), "do not match"),
    "text within a picture": ([[1, IMAGE, 2, IMAGE]], [[1, 2, 4]], "do not stand together"),
    "a picture on two rows": ([[1, IMAGE], [1, IMAGE]], [[1, 2, 4]], "do not stand together"),
    "a grid of half blocks": ([[1, IMAGE]], [[1, 2, 3]], "not a multiple of 2"),
    "an empty grid": ([[1, IMAGE]], [[1, 0, 2], [1, 2, 2]], "a side is 0"),
    "a negative grid": ([[1, IMAGE]], [[1, -2, -2]], "a side is 0"),
}


@pytest.mark.parametrize(("ids", "grids", "told"), REFUSED.values(), ids=REFUSED)
def test_grids_that_do_not_fit_are_refused(ids: Any, grids: Any, told: str) -> None:
    ids = np.array(ids)
    with pytest.raises(Exception, match="refused: ") as caught:
        ours(ids, np.ones_like(ids), np.array(grids))
    reason = refusal(caught.value)
    assert reason is not None
    assert told in reason[0]


def test_frequencies_are_shared_out() -> None:
    assert axes_of_frequencies([2, 3, 3], interleaved=False) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert axes_of_frequencies([4, 2, 2], interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]
    real = axes_of_frequencies([24, 20, 20], interleaved=True)
    assert [real.count(axis) for axis in range(3)] == [24, 20, 20]
    assert real[1::3][:20] == [1] * 20
    assert real[-4:] == [0] * 4
    few = axes_of_frequencies([2, 3, 3], interleaved=True)  # not enough room for the last ones
    assert few == [0, 1, 2, 0, 1, 2, 0, 1]
