"""A request by itself: how long it may become, what it guesses, what an interrupt leaves of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Manifest
from vlmport.errors import OptionError, PromptError
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.graphs.cache import SavedRow
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import (
    Lookup,
    Request,
    answer_length,
    check_default,
    new_request,
    room_for_tokens,
)

CONTEXT, DEFAULT = 40, 12
STOP = 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("toy")
    options: dict[str, Any] = {"context": CONTEXT, "max_new_tokens": DEFAULT, "stop": (STOP,)}
    return toy.write_bundle(folder, **options).manifest


@pytest.fixture
def components(manifest: Manifest) -> Components:
    return of(manifest)


def of(manifest: Manifest, *, row_by_row: bool = False, dtype: Any = np.float32) -> Components:
    """What a request asks of the graphs, none of which is opened."""
    decoder = SimpleNamespace(row_by_row=row_by_row, ports=[SimpleNamespace(dtype=np.dtype(dtype))])
    return cast(Components, SimpleNamespace(manifest=manifest, decoder=decoder, precision="q8"))


def embeds(tokens: int) -> np.ndarray:
    return np.zeros((tokens, toy.HIDDEN), np.float32)


def logits(*tokens: int) -> np.ndarray:
    """Logits of one row each that greedy decoding chooses this token from."""
    return np.eye(toy.VOCAB, dtype=np.float32)[list(tokens)]


def asked(components: Components, ids: Sequence[int], **options: Any) -> Request:
    options = {"max_new_tokens": 9, **options}
    told = GenerationOptions.of(options)
    return new_request(components, embeds(len(ids)), told, prompt_ids=np.array(ids, np.int64))


# Room in the context


@pytest.mark.parametrize(("tokens", "room"), [(1, 40), (39, 2), (40, 1)])
def test_the_last_token_needs_no_room(components: Components, tokens: int, room: int) -> None:
    assert room_for_tokens(components, tokens) == room


def test_a_prompt_longer_than_the_context(components: Components) -> None:
    with raises(PromptError, "prompt.too-long", "41", "40") as caught:
        room_for_tokens(components, 41)
    assert caught.value.code == "prompt.too-long"


def test_an_empty_prompt(components: Components) -> None:
    with raises(PromptError, "prompt.empty"):
        room_for_tokens(components, 0)


@pytest.mark.parametrize(
    ("tokens", "options", "most"),
    [
        (5, {}, DEFAULT),
        (5, {"max_new_tokens": 20}, 20),
        (5, {"max_new_tokens": 99}, 36),  # what the context allows
        (35, {}, 6),
        (5, {"max_length": 9}, 4),
        (5, {"min_new_tokens": 12}, DEFAULT),
        (5, {"min_length": 17}, DEFAULT),
    ],
)
def test_the_number_of_new_tokens(
    components: Components, tokens: int, options: dict[str, int], most: int
) -> None:
    told = GenerationOptions.of(options)
    assert answer_length(components, tokens, told) == most
    assert new_request(components, embeds(tokens), told).max_new_tokens == most


@pytest.mark.parametrize(
    ("tokens", "options", "names"),
    [
        (9, {"max_length": 9}, ["max_length=9", "9 tokens"]),
        (5, {"min_new_tokens": 13}, ["min_new_tokens=13", f"max_new_tokens={DEFAULT}"]),
        (5, {"min_length": 18}, ["min_new_tokens=13", f"max_new_tokens={DEFAULT}"]),
        (38, {"min_new_tokens": 4, "max_new_tokens": 9}, ["min_new_tokens=4", "3", "38"]),
    ],
)
def test_lengths_that_contradict_each_other(
    components: Components, tokens: int, options: dict[str, int], names: list[str]
) -> None:
    with pytest.raises(OptionError) as caught:
        answer_length(components, tokens, GenerationOptions.of(options))
    assert all(name in str(caught.value) for name in names)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("tokens", "wanted", "refused"),
    [
        (31, 12, False),  # room for 10, a quarter of the context
        (32, 12, True),
        (32, 9, False),  # as many as are wanted
        (33, 9, True),
    ],
)
def test_a_prompt_that_leaves_little_room(
    components: Components, tokens: int, wanted: int, refused: bool
) -> None:
    options = GenerationOptions(wanted)
    assert answer_length(components, tokens, options) == min(wanted, 41 - tokens)
    if not refused:
        assert answer_length(components, tokens, options, leaves_room=True)
        return
    with pytest.raises(PromptError) as caught:
        answer_length(components, tokens, options, leaves_room=True)
    assert caught.value.code == "prompt.too-long"


def test_what_the_cache_holds_already_counts(components: Components) -> None:
    """The prompt of a turn is what is new in it."""
    kept = SavedRow(30, 0, ())
    request = new_request(components, embeds(6), GenerationOptions(20), prefix=kept)
    assert (request.length, request.max_new_tokens) == (36, 5)
    assert new_request(components, embeds(6), GenerationOptions(20)).length == 6


# What it has so far


def test_it_is_done_at_a_stop_token_of_the_bundle(components: Components) -> None:
    request = asked(components, [5, 6])
    assert (request.done, request.tokens) == (False, ())
    for token in (7, STOP):
        assert not request.done
        request.choose(logits(token))
    assert request.done
    assert request.tokens == (7, STOP)


def test_a_cancelled_request_can_be_read(components: Components) -> None:
    request = asked(components, [5, 6])
    request.choose(logits(7))
    request.cancel()
    assert request.done
    assert request.tokens == (7,)


def test_a_choice_that_was_made_before_an_interrupt_is_not_made_again(
    components: Components,
) -> None:
    request = asked(components, [5, 6])
    request.choose(logits(7))
    request.search.choose(logits(8))  # and then the interrupt came
    request.choose(logits(9))
    assert request.tokens == (7, 8)
    assert [choice.tokens for choice in request.choices] == [(7,), (8,)]
    request.choose(logits(9))
    assert request.tokens == (7, 8, 9)


# Guesses


def guess(components: Components, ids: list[int], made: Sequence[int], **options: Any) -> list[int]:
    request = asked(components, ids, prompt_lookup_num_tokens=4, **options)
    for token in made:
        request.choose(logits(token))
    return request.draft()


def test_a_guess_is_what_followed_before(components: Components) -> None:
    assert guess(components, [5, 6, 7, 8, 9], [5]) == [6, 7, 8, 9]
    assert guess(components, [5, 6, 7, 8, 9], [5, 6]) == [7, 8, 9, 5]
    assert guess(components, [5, 6, 7, 8, 9], [10]) == []


def test_what_it_has_said_itself_counts(components: Components) -> None:
    assert guess(components, [5, 6], [20, 21, 22, 20]) == [21, 22, 20]


@pytest.mark.parametrize(("most", "length"), [(2, 0), (3, 1), (5, 3), (9, 4)])
def test_a_guess_leaves_room_for_the_next_choice(
    components: Components, most: int, length: int
) -> None:
    assert len(guess(components, [5, 6, 7, 8, 9], [5], max_new_tokens=most)) == length


@pytest.mark.parametrize("end", [STOP, toy.IMAGE, 100, 101])
def test_a_guess_ends_before_what_no_text_goes_on_with(manifest: Manifest, end: int) -> None:
    """A stop token, the image token, and those that the decoder has no logit for."""
    narrow = dataclasses.replace(manifest.dims, vocab_size=100)
    components = of(dataclasses.replace(manifest, dims=narrow))
    assert guess(components, [5, 6, end, 8, 9], [5]) == [6]
    assert guess(components, [5, 6, 99, 8, 9], [5]) == [6, 99, 8, 9]


def test_without_the_option_nothing_is_guessed(components: Components) -> None:
    request = asked(components, [5, 6, 7])
    request.choose(logits(5))
    assert request.lookup is None
    assert request.draft() == []


def test_without_ids_a_guess_looks_at_new_tokens_alone(components: Components) -> None:
    options = GenerationOptions.of({"max_new_tokens": 9, "prompt_lookup_num_tokens": 4})
    request = new_request(components, embeds(3), options)
    for token in (20, 21, 20):
        request.choose(logits(token))
    assert request.draft() == [21, 20]
    assert Lookup(4, 2).until == ()


@pytest.mark.parametrize("graphs", [{"row_by_row": True}, {"dtype": np.float16}], ids=str)
def test_guesses_are_refused_where_they_could_change_the_text(
    manifest: Manifest, graphs: dict[str, Any]
) -> None:
    components = of(manifest, **graphs)
    with raises(OptionError, "option.not-for-this-model", "prompt_lookup_num_tokens", "q8"):
        asked(components, [5, 6], prompt_lookup_num_tokens=4)
    with raises(OptionError, "option.not-for-this-model", "prompt_lookup_num_tokens", "q8"):
        check_default(components, "prompt_lookup_num_tokens", 4)
    asked(components, [5, 6])
    check_default(components, "prompt_lookup_num_tokens", None)


# Defaults of a generation_config.json


@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_a_default_that_is_longer_than_the_longest_text(components: Components, name: str) -> None:
    check_default(components, name, DEFAULT)
    with raises(OptionError, "option.contradiction", f"{name}=13", f"max_new_tokens={DEFAULT}"):
        check_default(components, name, DEFAULT + 1)


def test_a_default_outside_the_vocabulary(manifest: Manifest) -> None:
    components = of(manifest)
    check_default(components, "bad_words_ids", [[toy.VOCAB - 1]])
    with raises(OptionError, "option.wrong-value", "bad_words_ids", toy.VOCAB):
        check_default(components, "bad_words_ids", [[toy.VOCAB]])


def test_a_default_that_looks_at_a_prompt_that_is_not_seen(manifest: Manifest) -> None:
    unseen = dataclasses.replace(manifest.generation, processors_see_prompt=False)
    with raises(OptionError, "option.not-for-this-model", "encoder_no_repeat_ngram_size=2"):
        check_default(
            of(dataclasses.replace(manifest, generation=unseen)), "encoder_no_repeat_ngram_size", 2
        )
    seen = dataclasses.replace(manifest.generation, processors_see_prompt=True)
    check_default(
        of(dataclasses.replace(manifest, generation=seen)), "encoder_no_repeat_ngram_size", 2
    )
