"""The loop, greedy: the reference's tokens, alone and together, stopped, interrupted, cut short."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from vlmport.errors import DeviceError, OptionError, PromptError
from vlmport.runtime.decoding import new_search
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.model import VLM
from vlmport.runtime.request import Request, new_request

WEIGHTS = toy.Weights.random()


def embeds_of(length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng([seed, length]).integers(0, toy.VOCAB, length)
    return WEIGHTS["embed"][ids]


def search_of(tokens: int = 12, stop: tuple[int, ...] = (), **options):
    return new_search(
        GenerationOptions(**options),
        prompt_ids=[],
        processors_see_prompt=False,
        stop_token_ids=stop,
        max_new_tokens=tokens,
        vocab_size=toy.VOCAB,
    )


def request_of(
    length: int, seed: int = 0, tokens: int = 12, stop: tuple[int, ...] = (), **options
) -> Request:
    return Request(embeds_of(length, seed), search_of(tokens, stop, **options), tokens)


def stop_reason(request: Request) -> str | None:
    (answer,) = request.search.results()
    return answer.stop_reason


def run(components: Components, *requests: Request) -> list[list[int]]:
    Generation(components, requests).run()
    return [list(request.tokens) for request in requests]


def test_greedy_tokens_are_the_references(components: Components):
    want = toy.reference_greedy(WEIGHTS, embeds_of(17), 40)
    assert len(set(want)) > 3  # a text that says one thing only would prove little
    assert run(components, request_of(17, tokens=40)) == [want]


@settings(max_examples=20, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=5),
    stop=st.lists(st.integers(0, toy.VOCAB - 1), max_size=12),
)
def test_rows_together_give_what_each_gives_alone(bundle, asked, stop):
    components = Components.open(bundle, threads=1)
    requests = [request_of(n, seed, new, tuple(stop)) for seed, (n, new) in enumerate(asked)]
    alone = [request_of(n, seed, new, tuple(stop)) for seed, (n, new) in enumerate(asked)]
    together = run(components, *requests)
    assert together == [run(components, one)[0] for one in alone]
    for tokens, (_, new), request in zip(together, asked, requests, strict=True):
        assert not set(tokens[:-1]) & set(stop)
        assert stop_reason(request) == ("stop" if tokens[-1] in stop else "length")
        assert len(tokens) == new or tokens[-1] in stop


def test_stop_ids_are_a_set(components: Components):
    free = run(components, request_of(9))[0]
    later = next(token for token in free if token != free[0])
    first = free.index(later)
    request = request_of(9, stop=(112, later))
    assert run(components, request)[0] == free[: first + 1]
    assert stop_reason(request) == "stop"


def test_finished_rows_cost_nothing(components: Components, monkeypatch: pytest.MonkeyPatch):
    """Rows that end at different times: each step holds only those that go on."""
    sizes = []
    embed = components.embed

    def counted(ids: np.ndarray) -> np.ndarray:
        sizes.append(len(ids))
        return embed(ids)

    monkeypatch.setattr(components, "embed", counted)
    run(
        components,
        request_of(5, 0, 2),
        request_of(6, 1, 5),
        request_of(7, 2, 1),
        request_of(8, 3, 4),
    )
    assert sizes == [3, 2, 2, 1]


def test_min_new_tokens_masks_the_stop_tokens(components: Components):
    free = run(components, request_of(9))[0]
    stop = (free[0], toy.VOCAB + 5)  # an id that the head does not know
    tokens = run(components, request_of(9, stop=stop, min_new_tokens=4))[0]
    assert free[0] not in tokens[:4]
    assert len(tokens) >= 5


@pytest.mark.parametrize("at", range(12))
def test_an_interrupt_leaves_rows_that_are_right(components: Components, monkeypatch, at: int):
    """Ctrl-C after any call of the decoder: what is there is a prefix, and it can go on."""
    asked = [(5, 0, 6), (9, 1, 9), (3, 2, 2)]
    want = run(components, *(request_of(*one) for one in asked))
    requests = [request_of(*one) for one in asked]
    generation = Generation(components, requests)
    session, calls = components.decoder.session, 0
    original = session.run_with_iobinding

    def interrupted(binding: object) -> None:
        nonlocal calls
        original(binding)
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_with_iobinding", interrupted)
    if at:
        with pytest.raises(KeyboardInterrupt):
            generation.run()
        assert not generation.done
    for request, whole in zip(requests, want, strict=True):
        assert list(request.tokens) == whole[: len(request.tokens)]
    generation.run()
    assert [list(request.tokens) for request in requests] == want


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_between_two_rows_of_a_step(components: Components, monkeypatch, when: str):
    """Before the second request chooses, and when it has chosen but the loop does not know."""
    want = run(components, request_of(5, 0), request_of(9, 1))
    requests = [request_of(5, 0), request_of(9, 1)]
    kind = type(requests[0].search)
    choose, calls = kind.choose, 0

    def interrupted(self, logits: np.ndarray):
        nonlocal calls
        calls += 1
        if calls == 6 and when == "before":
            raise KeyboardInterrupt
        choice = choose(self, logits)
        if calls == 6:
            raise KeyboardInterrupt
        return choice

    monkeypatch.setattr(kind, "choose", interrupted)
    generation = Generation(components, requests)
    with pytest.raises(KeyboardInterrupt):
        generation.run()
    assert [len(request.tokens) for request in requests] == [3, 2 if when == "before" else 3]
    generation.run()
    assert [list(request.tokens) for request in requests] == want


def test_the_context_ends_a_row(own_bundle):
    """A context of 20 holds 15 tokens of prompt and feeds 5 more; a sixth comes for free."""
    components = Components.open(own_bundle(context=20, stop=()), threads=1)
    options = GenerationOptions(max_new_tokens=100)
    requests = [new_request(components, embeds_of(length), options) for length in (15, 20)]
    assert [len(tokens) for tokens in run(components, *requests)] == [6, 1]
    assert [stop_reason(request) for request in requests] == ["length", "length"]
    with raises(PromptError, "prompt.too-long", "21", "20"):
        Generation(components, [request_of(21)])
    with raises(PromptError, "prompt.empty"):
        Generation(components, [request_of(0)])
    with raises(PromptError, "prompt.too-long", "7", "15", "20") as caught:
        Generation(components, [request_of(15, tokens=7)])
    assert "at most 6" in str(caught.value.hint)


def test_no_requests_at_all(components: Components):
    assert run(components) == []


def test_the_cache_grows_when_a_text_is_long(components: Components, monkeypatch):
    monkeypatch.setattr("vlmport.runtime.generate.FIRST_CAPACITY", 3)
    assert run(components, request_of(6, tokens=60))[0] == toy.reference_greedy(
        WEIGHTS, embeds_of(6), 60
    )


def test_scores_that_are_no_numbers_are_refused(components: Components):
    embeds = embeds_of(6)
    embeds[2] = np.nan
    with raises(DeviceError, "device.not-finite", "0") as caught:
        run(components, Request(embeds, search_of(5), 5))
    assert "--probe" in caught.value.hint


@pytest.mark.parametrize("fault", ["cache lost", "length lags", "wrong row"])
def test_a_stale_cache_changes_the_text(components: Components, monkeypatch, fault: str):
    """The tests above can fail: each of these breaks the cache as real bugs do."""
    from vlmport.runtime.graphs.cache import KeyValueCache

    want = run(components, request_of(9, 0), request_of(7, 1))
    step = KeyValueCache.step

    def broken(self: KeyValueCache, embeds: np.ndarray) -> np.ndarray:
        if fault == "cache lost":
            for buffer in self.buffers:
                buffer[:, :, self.lengths[0] - 1] = 0
        if fault == "length lags":
            self.lengths = [length - 1 for length in self.lengths]
        if fault == "wrong row":
            for buffer in self.buffers:
                buffer[...] = buffer[::-1].copy()
        return step(self, embeds)

    monkeypatch.setattr(KeyValueCache, "step", broken)
    assert run(components, request_of(9, 0), request_of(7, 1)) != want


def test_a_request_under_the_bundles_defaults(components: Components):
    request = new_request(components, embeds_of(3), GenerationOptions())
    assert request.max_new_tokens == 12
    (tokens,) = run(components, request)
    assert 0 not in tokens[:-1]
    assert len(tokens) == 12 or tokens[-1] == 0
    request = new_request(components, embeds_of(3), GenerationOptions(5, min_new_tokens=2))
    assert (request.max_new_tokens, len(run(components, request)[0])) == (5, 5)


def test_min_new_tokens_is_never_cut_in_silence(own_bundle, vlm: VLM):
    """Neither by the bundle's default length, which is 12, nor by the context."""
    with raises(OptionError, "option.contradiction", "max_new_tokens=12") as e:
        vlm.caption(toy.picture(), min_new_tokens=40)
    assert e.value.hint == "give max_new_tokens too, at least 40"
    assert vlm.features.misses == 0  # said before anything was encoded
    caption = vlm.caption(toy.picture(), min_new_tokens=40, max_new_tokens=40)
    assert len(caption.token_ids) == 40
    components = Components.open(own_bundle(context=20), threads=1)
    options = GenerationOptions(100, min_new_tokens=7)
    assert new_request(components, embeds_of(14), options).max_new_tokens == 7
    with raises(OptionError, "option.no-room", "6", "15"):
        new_request(components, embeds_of(15), options)


def test_numbers_of_numpys_are_numbers():
    options = GenerationOptions(np.int64(3), min_new_tokens=np.uint8(2))
    assert (type(options.max_new_tokens), type(options.min_new_tokens)) == (int, int)
    assert options == GenerationOptions(3, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_token": 5}, "unknown option 'max_new_token' (did you mean 'max_new_tokens'?)"),
        ({"colour": 1, "min_tokens": 2}, "unknown option 'colour', 'min_tokens'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, expected a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"min_new_tokens": "3"}, "min_new_tokens='3'"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than"),
    ],
)
def test_bad_options(given: dict, said: str):
    with pytest.raises(OptionError) as caught:
        GenerationOptions.of(given)
    assert said in str(caught.value)
    assert caught.value.hint
