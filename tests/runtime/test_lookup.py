"""Prompt lookup: Hugging Face's guesses, the same tokens in fewer calls of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.errors import OptionError
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.prompt_lookup import look_up
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.decoder import Decoder
from vlmport.runtime.model import VLM
from vlmport.runtime.request import Request, new_request

WEIGHTS = toy.Weights.random()


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    count=st.integers(1, 6),
    largest=st.integers(1, 4),
)
def test_guesses_are_hugging_faces(ids: list[int], count: int, largest: int):
    theirs = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor([3]),
        num_output_tokens=count,
        max_matching_ngram_size=largest,
        max_length=1000,
    )
    candidates, _ = theirs.get_candidates(torch.tensor([ids]))
    want = candidates[0, len(ids) :].tolist()
    assert look_up(np.array(ids), count, largest, until={3}) == want


def request_of(components: Components, ids: list[int], **options) -> Request:
    prompt = np.array(ids, np.int64)
    embeds = WEIGHTS["embed"][prompt]
    return new_request(components, embeds, GenerationOptions(**options), prompt_ids=prompt)


def calls_of(components: Components, request: Request, monkeypatch) -> int:
    """Run it; how often the decoder was called."""
    session, calls = components.decoder.session, []
    original = session.run_with_iobinding
    with monkeypatch.context() as patch:
        patch.setattr(
            session, "run_with_iobinding", lambda binding: calls.append(1) or original(binding)
        )
        Generation(components, [request]).run()
    return len(calls)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    plain = [rng.integers(1, toy.VOCAB, n).tolist() for n in (1, 2, 9, 30)]
    repetitive = [list(rng.integers(1, toy.VOCAB, n)) * 6 for n in (1, 3, 7)]
    markers = [[toy.START, *[toy.IMAGE] * 12, toy.END, 5, toy.START, *[toy.IMAGE] * 4, toy.END, 5]]
    return plain + repetitive + markers


@pytest.mark.parametrize("ids", prompts(), ids=len)
@pytest.mark.parametrize("sampling", [False, True])
def test_the_tokens_are_those_without_guesses(
    components: Components, monkeypatch, ids: list[int], sampling: bool
):
    options = {"max_new_tokens": 80}
    options |= {"do_sample": True, "seed": 7, "temperature": 0.5} if sampling else {}
    plain = request_of(components, ids, **options)
    guessed = request_of(components, ids, prompt_lookup_num_tokens=5, **options)
    calls = calls_of(components, plain, monkeypatch)
    assert calls_of(components, guessed, monkeypatch) <= calls == len(plain.tokens)
    assert guessed.tokens == plain.tokens


def test_a_text_that_repeats_itself_takes_fewer_calls(components: Components, monkeypatch):
    """Token by token what a loop guesses is right: five tokens a call."""
    options = {"max_new_tokens": 120}
    ids = next(
        ids
        for ids in prompts()
        if len(set((tokens := run(components, ids, **options))[-60:])) < 20 and len(tokens) == 120
    )
    plain = request_of(components, ids, **options)
    guessed = request_of(components, ids, prompt_lookup_num_tokens=5, **options)
    assert calls_of(components, plain, monkeypatch) == 120
    assert calls_of(components, guessed, monkeypatch) < 60
    assert guessed.tokens == plain.tokens


def run(components: Components, ids: list[int], **options) -> tuple[int, ...]:
    request = request_of(components, ids, **options)
    Generation(components, [request]).run()
    return request.tokens


def test_every_length_stops_where_it_should(components: Components):
    """A guess never goes past max_new_tokens, and a stop token in it ends the text."""
    ids = prompts()[6]
    for most in range(1, 30):
        plain = run(components, ids, max_new_tokens=most)
        assert run(components, ids, max_new_tokens=most, prompt_lookup_num_tokens=9) == plain


@pytest.mark.parametrize("at", range(1, 30, 3))
def test_an_interrupt_among_guesses(components: Components, monkeypatch, at: int):
    ids, options = prompts()[6], {"max_new_tokens": 60}
    want = run(components, ids, **options)
    request = request_of(components, ids, prompt_lookup_num_tokens=5, **options)
    generation = Generation(components, [request])
    kind, calls = type(request.search), 0
    choose = kind.choose

    def interrupted(self, logits: np.ndarray):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        choice = choose(self, logits)
        if calls == at + 1:
            raise KeyboardInterrupt
        return choice

    monkeypatch.setattr(kind, "choose", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generation.run()
        assert request.tokens == want[: len(request.tokens)]
    generation.run()
    assert request.tokens == want


def test_in_a_batch_it_guesses_once_it_is_alone(components: Components):
    ids = prompts()[6]
    want = run(components, ids, max_new_tokens=60)
    requests = [
        request_of(components, ids, max_new_tokens=60, prompt_lookup_num_tokens=5),
        request_of(components, ids[:5], max_new_tokens=9, prompt_lookup_num_tokens=2),
    ]
    Generation(components, requests).run()
    assert requests[0].tokens == want
    assert requests[1].tokens == run(components, ids[:5], max_new_tokens=9)


def test_where_a_guess_could_change_the_text_it_is_refused(vlm: VLM, monkeypatch):
    with raises(OptionError, "option.contradiction", "prompt_lookup_num_tokens"):
        vlm.caption(toy.picture(), prompt_lookup_num_tokens=3, num_beams=2)
    with raises(OptionError, "option.contradiction", "prompt_lookup_num_tokens"):
        vlm.caption(
            toy.picture(), prompt_lookup_num_tokens=3, num_return_sequences=2, do_sample=True
        )
    of = Decoder.of
    monkeypatch.setattr(Decoder, "of", lambda *a, **k: of(*a, **{**k, "row_by_row": True}))
    with raises(
        OptionError, "option.not-for-this-model", "prompt_lookup_num_tokens", "tokens of a call"
    ):
        vlm.caption(toy.picture(), prompt_lookup_num_tokens=3)


def test_a_float16_decoder_is_refused(own_bundle):
    vlm = VLM.open(own_bundle(cache_dtype=TensorProto.FLOAT16), threads=1)
    with raises(OptionError, "option.not-for-this-model", "float16") as caught:
        vlm.caption(toy.picture(), prompt_lookup_num_tokens=3)
    assert "q4" in caught.value.hint


@pytest.fixture(scope="module")
def shapes(built_in: Callable[[str], Bundle]) -> Bundle:
    return built_in("shapes")


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_a_trained_model_says_the_same_with_guesses(shapes: Bundle, precision: str):
    """Long past its stop token, where its text repeats itself."""
    vlm = VLM.open(shapes, precision=precision, threads=1)
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.png"))[::3]:
        for options in ({}, {"repetition_penalty": 1.1}, {"do_sample": True, "seed": 1}):
            options = {"max_new_tokens": 90, "min_new_tokens": 90, **options}
            guessed = vlm.caption(path, prompt_lookup_num_tokens=6, **options)
            assert guessed.token_ids == vlm.caption(path, **options).token_ids


def test_a_stop_token_is_not_guessed(own_bundle):
    bundle: Bundle = own_bundle(stop=(7,))
    components = Components.open(bundle, threads=1)
    request = request_of(components, [5, 7, 9, 5], prompt_lookup_num_tokens=3, max_new_tokens=9)
    request.search.choose(np.eye(toy.VOCAB, dtype="f4")[5:6])  # it has said 5 again
    request.choices.append(request.search.last)
    assert request.draft() == []  # 7 followed: the text would end
