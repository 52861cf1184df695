"""The bound cache: equal to a full pass, ragged, in chunks, grown, and never stale."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import weakref

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from vlmport.errors import PromptError
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components

WEIGHTS = toy.Weights.random()
TOLERANCE = 2e-3  # of logits up to 40


def embeds_of(length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng([seed, length]).integers(0, toy.VOCAB, length)
    return WEIGHTS["embed"][ids]


def new_cache(components: Components, rows: int = 1, capacity: int = 40) -> KeyValueCache:
    return KeyValueCache(components.decoder, rows, capacity, toy.CONTEXT)


def test_prefill_and_steps_equal_a_full_pass(components: Components):
    embeds = embeds_of(20)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components)
    np.testing.assert_allclose(cache.prefill(0, embeds[:12], keep=0), full[:12], atol=TOLERANCE)
    for i in range(12, 20):
        np.testing.assert_allclose(
            cache.step(embeds[None, i : i + 1]), full[i : i + 1], atol=TOLERANCE
        )
    assert cache.lengths == [20]


def test_everything_that_is_bound_outlives_its_binding(
    components: Components, monkeypatch: pytest.MonkeyPatch
):
    """ONNX Runtime reads addresses; not every version keeps the arrays that own them."""
    bound: list[weakref.ref[np.ndarray]] = []

    def to_ort(array: np.ndarray) -> ort.OrtValue:
        owner = array if array.base is None else array.base
        bound.append(weakref.ref(owner))
        return ort.OrtValue.ortvalue_from_numpy(array)

    def run(binding: ort.IOBinding) -> None:
        gc.collect()
        assert bound
        assert all(array() is not None for array in bound)
        components.decoder.session.run_with_iobinding(binding)

    cache = new_cache(components, rows=2)
    monkeypatch.setattr("vlmport.runtime.graphs.cache.to_ort", to_ort)
    monkeypatch.setattr(cache, "_run", run)
    strided = np.asfortranarray(embeds_of(12))  # has to be copied to be bound
    cache.prefill(0, strided)
    del bound[:]
    cache.step(strided[:2, None])
    cache.step(strided[2:4, None])


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    row=st.integers(0, 2),
)
def test_a_prompt_in_chunks_equals_it_in_one(bundle, cuts: list[int], row: int):
    components = Components.open(bundle, threads=1)
    embeds = embeds_of(sum(cuts))
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components, rows=3)
    at = 0
    for size in cuts:
        got = cache.prefill(row, embeds[at : at + size], keep=0)
        np.testing.assert_allclose(got, full[at : at + size], atol=TOLERANCE)
        at += size


@pytest.mark.parametrize("length", [3, 5, 6, 7, 10, 11, 25])
@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_a_long_prompt_is_read_in_chunks(
    components: Components, monkeypatch: pytest.MonkeyPatch, length: int, keep: int
):
    """From the first token on and after others; its logits and the cache are those of one call."""
    monkeypatch.setattr("vlmport.runtime.graphs.cache.CHUNK", 4)
    calls: list[int] = []
    append = KeyValueCache._append

    def counted(self, row, past, embeds, *rest):
        calls.append(len(embeds))
        return append(self, row, past, embeds, *rest)

    monkeypatch.setattr(KeyValueCache, "_append", counted)
    embeds = embeds_of(3 + length + 1)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components)
    cache.prefill(0, embeds[:3])
    del calls[:]
    got = cache.prefill(0, embeds[3:-1], keep=keep)
    np.testing.assert_allclose(got, full[3:-1][-keep:], atol=TOLERANCE)
    np.testing.assert_allclose(cache.step(embeds[None, -1:]), full[-1:], atol=TOLERANCE)
    whole = keep in (0, 3) or length <= 6
    assert calls == [length] if whole else calls[:-1] == [4] * (len(calls) - 1)
    assert whole or 3 <= calls[-1] <= 6


def test_a_prompt_is_read_in_one_where_chunks_would_cost(
    components: Components, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vlmport.runtime.graphs.cache.CHUNK", 4)
    cache = new_cache(components)
    assert cache.cuts(25, 1) == [0, 4, 8, 12, 16, 20, 25]
    cache.decoder = dataclasses.replace(cache.decoder, row_by_row=True)
    assert len(cache.cuts(25, 1)) == 7
    cache.on_host = False
    assert cache.cuts(25, 1) == [0, 25]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=5), steps=st.integers(1, 6))
def test_ragged_rows_step_together(bundle, lengths: list[int], steps: int):
    components = Components.open(bundle, threads=1)
    texts = [embeds_of(length + steps, seed) for seed, length in enumerate(lengths)]
    fulls = [toy.reference_logits(WEIGHTS, text) for text in texts]
    cache = new_cache(components, rows=len(lengths), capacity=4)  # it must grow
    for row in reversed(range(len(lengths))):
        got = cache.prefill(row, texts[row][: lengths[row]])
        np.testing.assert_allclose(got[-1], fulls[row][lengths[row] - 1], atol=TOLERANCE)
    for step in range(steps):
        fed = np.stack(
            [text[n + step : n + step + 1] for text, n in zip(texts, lengths, strict=True)]
        )
        want = np.stack([full[n + step] for full, n in zip(fulls, lengths, strict=True)])
        np.testing.assert_allclose(cache.step(fed), want, atol=TOLERANCE)


def test_a_step_binds_the_mask_and_nothing_else(components: Components, monkeypatch):
    """Binding all tensors anew costs more than the rest of a step's Python."""
    embeds = embeds_of(10)
    cache = new_cache(components, rows=2)
    for row in range(2):
        cache.prefill(row, embeds[:6])
    cache.step(np.stack([embeds[6:7]] * 2))
    bound: list[str] = []
    for method in ("bind_ortvalue_input", "bind_ortvalue_output", "bind_cpu_input"):
        original = getattr(ort.IOBinding, method)

        def counted(self: ort.IOBinding, name: str, *args: object, original=original) -> None:
            bound.append(name)
            original(self, name, *args)

        monkeypatch.setattr(ort.IOBinding, method, counted)
    for i in (7, 8):
        cache.step(np.stack([embeds[i : i + 1]] * 2))
    assert bound == ["attention_mask"] * 2


def test_only_the_first_rows_step(components: Components):
    embeds = embeds_of(10)
    cache = new_cache(components, rows=3)
    for row in range(3):
        cache.prefill(row, embeds[: 4 + row])
    before = [buffer.copy() for buffer in cache.buffers]
    cache.step(np.stack([embeds[4:5], embeds[5:6]]))
    assert cache.lengths == [5, 6, 6]
    for old, new in zip(before, cache.buffers, strict=True):
        np.testing.assert_array_equal(old[2], new[2])


def test_a_row_cut_back_is_as_if_never_longer(components: Components):
    embeds = embeds_of(20)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components)
    cache.prefill(0, embeds[:10])
    cache.step(embeds_of(5, seed=9)[None, :1])
    cache.lengths[0] = 10
    np.testing.assert_allclose(cache.step(embeds[None, 10:11])[0], full[10], atol=TOLERANCE)


def test_copied_rows_go_on_alike(components: Components):
    embeds = embeds_of(12)
    cache = new_cache(components, rows=2)
    cache.prefill(1, embeds[:11])
    cache.copy_row(1, 0)
    logits = cache.step(np.stack([embeds[11:]] * 2))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_rows_are_reordered_without_moving_those_that_stay(components: Components):
    """Continuations of rows 2, 0 and 2 again: two stay, one is copied over row 1."""
    texts = [embeds_of(6 + row, seed=row) for row in range(3)]
    cache = new_cache(components, rows=3)
    for row, text in enumerate(texts):
        cache.prefill(row, text)
    rows = cache.reorder([2, 0, 2])
    assert rows == [2, 0, 1]
    assert cache.lengths == [6, 8, 8]
    token = embeds_of(1, seed=9)
    full = [toy.reference_logits(WEIGHTS, np.concatenate([text, token]))[-1] for text in texts]
    logits = cache.step(np.stack([token] * 3))
    np.testing.assert_allclose(logits, np.stack([full[0], full[2], full[2]]), atol=TOLERANCE)


def test_more_continuations_than_rows(components: Components):
    embeds = embeds_of(9)
    cache = new_cache(components, rows=1)
    cache.prefill(0, embeds[:8])
    assert cache.reorder([0] * 4) == [0, 1, 2, 3]
    logits = cache.step(np.stack([embeds[8:]] * 4))
    full = toy.reference_logits(WEIGHTS, embeds)[-1]
    np.testing.assert_allclose(logits, np.stack([full] * 4), atol=TOLERANCE)
    assert cache.reorder([]) == []


@pytest.mark.parametrize("rows", [2, 5])
def test_growth_that_was_interrupted_at_any_line_is_done_again(components: Components, rows: int):
    text, token = embeds_of(7), embeds_of(1, seed=9)
    full = toy.reference_logits(WEIGHTS, np.concatenate([text, token]))[-1]
    grow, lines = KeyValueCache._grow.__code__, itertools.count(1)
    for at in lines:
        cache = new_cache(components, rows=2, capacity=8)
        cache.prefill(0, text)
        left = at

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code is not grow:
                return None
            left -= event == "line"
            if not left:
                left -= 1
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            cache._grow(rows, 20)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        cache.reserve_rows(rows)
        assert len(cache.lengths) == len(cache.rope_deltas) >= rows
        np.testing.assert_allclose(cache.step(token[None])[0], full, atol=TOLERANCE)
        if not interrupted:
            break
    assert at > 10


def test_a_copy_that_was_interrupted_is_not_trusted(components: Components):
    """Row 1 shares 8 tokens with row 0, until a copy of row 2 over it breaks off."""
    whole = embeds_of(10)
    cache = new_cache(components, rows=3)
    cache.prefill(0, whole)
    cache.prefill(1, np.concatenate([whole[:8], embeds_of(2, seed=1)]))
    cache.prefill(2, np.concatenate([whole[:3], embeds_of(7, seed=2)]))

    class BreaksOff(list):
        def __iter__(self):
            yield from self[:2]
            raise KeyboardInterrupt

    buffers = cache.buffers
    cache.buffers = BreaksOff(buffers)
    with pytest.raises(KeyboardInterrupt):
        cache.copy_row(2, 1, 3)
    cache.buffers = buffers
    assert cache.reorder([0, 0], lambda source, target: 8) == [0, 1]
    logits = cache.step(np.stack([embeds_of(1, seed=3)] * 2))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_more_rows_keep_what_is_there(components: Components):
    embeds = embeds_of(12)
    cache = new_cache(components, rows=1)
    cache.prefill(0, embeds[:11])
    cache.reserve_rows(3)
    assert cache.rows >= 3
    cache.prefill(2, embeds[:5])
    full = toy.reference_logits(WEIGHTS, embeds)
    np.testing.assert_allclose(cache.step(embeds[None, 11:])[0], full[11], atol=TOLERANCE)


def test_a_kept_row_outlives_its_cache(components: Components):
    embeds = embeds_of(12)
    cache = new_cache(components, rows=2)
    cache.rope_deltas[1] = 5
    cache.prefill(1, embeds[:11])
    want = cache.prefill(1, embeds[11:])
    cache.lengths[1] = 11
    kept = cache.save(1)
    other = new_cache(components, capacity=4)
    other.restore(0, kept)
    assert (other.lengths, other.rope_deltas) == ([11], [5])
    np.testing.assert_array_equal(other.prefill(0, embeds[11:]), want)


def test_growing_keeps_what_is_there(components: Components):
    embeds = embeds_of(60)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components, capacity=8)
    cache.prefill(0, embeds[:8])
    for i in range(8, 60):
        np.testing.assert_allclose(cache.step(embeds[None, i : i + 1])[0], full[i], atol=TOLERANCE)
    assert 60 <= cache.capacity <= toy.CONTEXT


def test_the_context_is_the_limit_and_nothing_runs(components: Components):
    cache = KeyValueCache(components.decoder, 1, 4, 8)
    with raises(PromptError, "prompt.too-long", "9", "8"):
        cache.prefill(0, embeds_of(9))
    cache.prefill(0, embeds_of(8))
    with raises(PromptError, "prompt.too-long", "8"):
        cache.step(embeds_of(1)[None])
    assert cache.lengths == [8]


def test_positions_go_on_at_the_offset(components: Components):
    """An offset of 3 equals positions that start 3 later: rotary angles are relative."""
    embeds = embeds_of(9)
    plain, moved = new_cache(components), new_cache(components)
    moved.rope_deltas[0] = 3
    want = plain.prefill(0, embeds[:8])
    np.testing.assert_allclose(moved.prefill(0, embeds[:8]), want, atol=TOLERANCE)
    got = moved.step(embeds[None, 8:]).copy()
    np.testing.assert_allclose(got, plain.step(embeds[None, 8:]), atol=TOLERANCE)
    moved.lengths[0], moved.rope_deltas[0] = 8, 0  # and a jump is seen
    assert np.abs(moved.step(embeds[None, 8:]) - got).max() > 1e-3


def test_a_decoder_with_positions_in_three_axes(own_bundle):
    components = Components.open(own_bundle(positions_rank=3), threads=1)
    assert components.decoder.positions_rank == 3
    embeds = embeds_of(9)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components, rows=2)
    for row in range(2):
        got = cache.prefill(row, embeds[:8], np.broadcast_to(np.arange(8), (3, 8)))
        np.testing.assert_allclose(got[-1], full[7], atol=TOLERANCE)
    logits = cache.step(np.stack([embeds[8:]] * 2))
    np.testing.assert_allclose(logits, np.stack([full[8]] * 2), atol=TOLERANCE)


def test_a_half_precision_cache(own_bundle):
    components = Components.open(own_bundle(cache_dtype=onnx.TensorProto.FLOAT16), threads=1)
    embeds = embeds_of(12)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components)
    assert {buffer.dtype for buffer in cache.buffers} == {np.dtype(np.float16)}
    cache.prefill(0, embeds[:11])
    np.testing.assert_allclose(cache.step(embeds[None, 11:])[0], full[11], atol=0.05)


def test_a_cache_that_is_not_fed_back_is_seen(components: Components):
    """The trap: presents written elsewhere. The next step must differ from the full pass."""
    embeds = embeds_of(12)
    full = toy.reference_logits(WEIGHTS, embeds)
    cache = new_cache(components)
    cache.prefill(0, embeds[:11])
    for buffer in cache.buffers:
        buffer[...] = 0
    assert np.abs(cache.step(embeds[None, 11:])[0] - full[11]).max() > 0.05
