"""Rows that part, end, join and leave: every logit is that of the row's own tokens.

The searches here choose at random, tokens and parents alike; each checks what it is handed
against the reference, which computes the whole sequence anew.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from vlmport.errors import PromptError
from vlmport.runtime.decoding.search import Choice, Hypothesis
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import Request

WEIGHTS = toy.Weights.random()
TOLERANCE = 2e-3  # of logits up to 40


def embeds_of(length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng([seed, length]).integers(0, toy.VOCAB, length)
    return WEIGHTS["embed"][ids]


class RandomSearch:
    """Goes on from its rows, none, one or several times each, and sees that their logits are
    right."""

    seed = None

    def __init__(self, embeds: np.ndarray, rows: int, steps: int, seed: int):
        self.embeds, self.rows, self.most = embeds, rows, steps
        self.rng = np.random.default_rng(seed)
        self.steps = 0
        self.last: Choice | None = None
        self.texts: list[tuple[int, ...]] = [()]

    @property
    def done(self) -> bool:
        return self.steps >= self.most

    def choose(self, logits: np.ndarray) -> Choice:
        assert len(logits) == len(self.texts)
        for text, got in zip(self.texts, logits, strict=True):
            embeds = np.concatenate([self.embeds, WEIGHTS["embed"][list(text)]])
            want = toy.reference_logits(WEIGHTS, embeds)[-1]
            np.testing.assert_allclose(got, want, atol=TOLERANCE)
        count = 0 if self.steps + 1 == self.most else int(self.rng.integers(1, self.rows + 1))
        parents = self.rng.integers(0, len(self.texts), count).tolist()
        tokens = self.rng.integers(0, toy.VOCAB, count).tolist()
        choice = Choice(tuple(tokens), tuple(parents))
        texts = [(*self.texts[p], token) for p, token in zip(parents, tokens, strict=True)]
        self.texts, self.last, self.steps = texts, choice, self.steps + 1
        return choice

    def results(self) -> list[Hypothesis]:
        return [Hypothesis(text, None) for text in self.texts]


def request_of(rows: int, steps: int, seed: int, length: int | None = None) -> Request:
    embeds = embeds_of(length or 3 + seed % 9, seed)
    return Request(embeds, RandomSearch(embeds, rows, steps, seed), steps)


asked = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 50)), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(asked=asked)
def test_every_row_has_the_logits_of_its_own_tokens(bundle, asked):
    requests = [request_of(*one) for one in asked]
    Generation(Components.open(bundle, threads=1), requests).run()
    assert all(request.search.steps == request.search.most for request in requests)


@settings(max_examples=40, deadline=None)
@given(asked=asked, data=st.data())
def test_requests_come_and_go_between_steps(bundle, asked, data: st.DataObject):
    """Continuous batching: what others do is nothing to a request."""
    generation = Generation(Components.open(bundle, threads=1))
    waiting = [request_of(*one) for one in asked]
    came, left = [], []
    while waiting or not generation.done:
        if waiting and (generation.done or data.draw(st.booleans())):
            came.append(waiting.pop())
            generation.add(came[-1])
        elif (live := generation.requests) and data.draw(st.integers(0, 5)) == 0:
            live[0].cancel()
            left.append(live[0])
        else:
            moved = generation.step()
            assert not set(moved) & set(left)
    for request in came:
        assert request.done
        assert request in left or request.search.steps == request.search.most


@settings(max_examples=60, deadline=None)
@given(asked=asked, at=st.lists(st.integers(1, 25), max_size=4), data=st.data())
def test_an_interrupt_at_any_point_of_any_step(bundle, asked, at: list[int], data: st.DataObject):
    """In a call of the decoder, in the middle of a copy, before and after a choice; meanwhile
    a request may leave and another come."""
    components = Components.open(bundle, threads=1)
    requests = [request_of(*one) for one in asked]
    generation = Generation(components, requests)
    steps, interrupts = iter(range(10**6)), set(at)

    def ticking(work):
        def run(*args):
            if next(steps) in interrupts:
                raise KeyboardInterrupt
            made = work(*args)
            if next(steps) in interrupts:
                raise KeyboardInterrupt
            return made

        return run

    def half_copied(self: KeyValueCache, source: int, target: int, start: int = 0) -> None:
        if next(steps) in interrupts:
            self.lengths[target] = start
            for buffer in self.buffers[:2]:
                used = self.lengths[source]
                buffer[target, :, start:used] = buffer[source, :, start:used]
            raise KeyboardInterrupt
        copy_row(self, source, target, start)

    copy_row = KeyValueCache.copy_row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation.cache, "_run", ticking(generation.cache._run))
        patch.setattr(KeyValueCache, "copy_row", half_copied)
        patch.setattr(RandomSearch, "choose", ticking(RandomSearch.choose))
        while not generation.done:
            try:
                generation.run()
            except KeyboardInterrupt:
                if data.draw(st.booleans()):
                    requests.append(request_of(2, 3, 99))
                    generation.add(requests[-1])
                if data.draw(st.booleans()) and (live := generation.requests):
                    live[-1].cancel()
    for request in requests:
        assert request.cancelled or request.search.steps == request.search.most


def test_a_wrong_reorder_would_be_seen(components: Components, monkeypatch: pytest.MonkeyPatch):
    """The tests above can fail: a copy left out, or one that trusts too much."""
    with monkeypatch.context() as patch:
        patch.setattr(KeyValueCache, "copy_row", lambda *args: None)
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            Generation(components, [request_of(3, 6, 1)]).run()
    copy_row = KeyValueCache.copy_row

    def too_little(self: KeyValueCache, source: int, target: int, start: int = 0) -> None:
        copy_row(self, source, target, min(start + 1, int(self.lengths[source])))

    monkeypatch.setattr(KeyValueCache, "copy_row", too_little)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        Generation(components, [request_of(3, 6, 1)]).run()


class Straight(RandomSearch):
    """All rows go on, each from where it is, in another order each time."""

    def choose(self, logits: np.ndarray) -> Choice:
        first = not self.steps
        count = self.rows
        parents = [0] * count if first else self.rng.permutation(count).tolist()
        tokens = self.rng.integers(0, toy.VOCAB, count).tolist()
        self.texts = [(*self.texts[p], t) for p, t in zip(parents, tokens, strict=True)]
        self.last, self.steps = Choice(tuple(tokens), tuple(parents)), self.steps + 1
        return self.last


class Forked(Straight):
    """Always two rows from the first, the second is dropped: they share all but one token."""

    def choose(self, logits: np.ndarray) -> Choice:
        super().choose(logits)
        tokens = self.last.tokens
        self.last = Choice(tokens, (0, 0))
        return self.last


@pytest.mark.parametrize(("kind", "copied"), [(Straight, 2 * 7), (Forked, 7 + 4)])
def test_only_what_moves_is_copied(components: Components, monkeypatch, kind, copied: int):
    """Rows that only change their order cost nothing; twins are copied from where they part."""
    counts = []
    copy_row = KeyValueCache.copy_row

    def counted(self: KeyValueCache, source: int, target: int, start: int = 0) -> None:
        counts.append(int(self.lengths[source]) - start)
        copy_row(self, source, target, start)

    monkeypatch.setattr(KeyValueCache, "copy_row", counted)
    embeds = embeds_of(7)
    search = kind(embeds, 3 if kind is Straight else 2, 6, 0)
    Generation(components, [Request(embeds, search, 7)]).run()
    assert sum(counts) == copied


def test_a_cancelled_request_frees_its_rows(components: Components, monkeypatch):
    sizes = []
    embed = components.embed
    monkeypatch.setattr(components, "embed", lambda ids: sizes.append(len(ids)) or embed(ids))
    one, other = request_of(1, 6, 3), request_of(1, 6, 4)
    generation = Generation(components, [one, other])
    for _ in range(4):
        generation.step()
    one.cancel()
    generation.run()
    assert sizes == [2, 2, 1, 1, 1]
    assert (one.search.steps, other.search.steps) == (3, 6)
    assert generation.requests == []
    waiting = request_of(1, 6, 5)
    generation.add(waiting)
    waiting.cancel()
    assert generation.done
    assert generation.step() == []


def test_a_request_that_may_leave_the_context_is_not_added(components: Components):
    generation = Generation(components)
    with raises(PromptError, "prompt.too-long", "7", "195", "200"):
        generation.add(request_of(1, 7, 0, length=195))
    assert generation.requests == []


def test_a_kept_row_is_where_the_next_request_begins(components: Components):
    """A conversation: the next prompt continues what the cache held, in another generation."""
    whole = embeds_of(30)
    first = Request(whole[:10], RandomSearch(whole[:10], 1, 5, 0), 5)
    generation = Generation(components, [first])
    generation.run()
    kept = generation.save(first)
    made = [choice.tokens[0] for choice in first.choices[:-1]]
    assert kept.length == 10 + len(made)
    so_far = np.concatenate([whole[:10], WEIGHTS["embed"][made]])
    search = RandomSearch(np.concatenate([so_far, whole[10:14]]), 3, 5, 1)
    second = Request(whole[10:14], search, 5, prefix=kept)
    Generation(components, [request_of(2, 4, 7), second, request_of(2, 4, 8)]).run()
    assert search.steps == 5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_what_is_kept_before_the_end(components: Components, rows: int, steps: int):
    """Of several rows the prompt alone; of one what was chosen, and no guess that was fed."""
    whole = embeds_of(10)
    search = RandomSearch(whole, rows, 5, 2)
    request = Request(whole, search, 5)
    generation = Generation(components, [request])
    for _ in range(steps):
        generation.step()
    generation.cache.lengths[0] += 2  # as where guesses are not judged yet
    kept = generation.save(request)
    assert kept.length == (10 if rows > 1 else 10 + steps - 1)
    made = list(search.texts[0])[: kept.length - 10]
    so_far = np.concatenate([whole, WEIGHTS["embed"][made], whole[:3]])
    second = Request(whole[:3], RandomSearch(so_far, 2, 3, 1), 3, prefix=kept)
    Generation(components, [second]).run()
    assert second.search.steps == 3
