"""Text under a grammar: right whatever the model would rather say, and clear errors."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from pathlib import Path

import fastjsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.checkpoints import write_tokenizer
from tests.errors import raises
from tests.runtime.test_streamed_text import byte_fallback, metaspace
from tests.shared_testdata import shared_testdata
from vlmport.builtin import builtin_folder
from vlmport.errors import DependencyError, OptionError
from vlmport.runtime.decoding import new_search
from vlmport.runtime.decoding.grammar import Grammar, Grammars
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.search import Hypothesis

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "👍"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEXES = ["(yes|no)", "[a-f]{2,7} (red|blue) squares?", "é?👍+.", "a? ?"]


@functools.cache
def tokenizer_of(name: str) -> tuple[Tokenizer, int]:
    """The tokenizer and the id at which its model stops."""
    if name == "byte_fallback":
        return byte_fallback(), 2
    folder = builtin_folder("shapes") if name == "shapes" else Path(name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known = ("<end_of_utterance>", "<|im_end|>", "<|endoftext|>")
    stops = [i for one in known if (i := tokenizer.token_to_id(one)) is not None]
    return tokenizer, stops[0]


@functools.cache
def grammars_of(name: str) -> Grammars:
    tokenizer, stop = tokenizer_of(name)
    return Grammars(tokenizer, tokenizer.get_vocab_size(), (stop,))


REAL = [shared_testdata("tokenizers", one) for one in ("SmolVLM-256M-Instruct", "Qwen3-VL")]
SMALL = ["shapes", "byte_fallback"]
NAMES = [*SMALL, *(str(path) for path in REAL if path)]


def say(name: str, noise: int, **options) -> list[tuple[str, Hypothesis]]:
    """What a model of random logits says."""
    tokenizer, stop = tokenizer_of(name)
    asked = GenerationOptions(**options)
    grammar = grammars_of(name).of(asked)
    vocab_size, rng = tokenizer.get_vocab_size(), np.random.default_rng(noise)
    search = new_search(
        asked,
        prompt_ids=[],
        processors_see_prompt=False,
        stop_token_ids=(stop,),
        max_new_tokens=200,
        vocab_size=vocab_size,
        mask=grammar.fresh().mask if grammar else None,
    )
    rows = 1
    while not search.done:
        rows = len(search.choose(rng.standard_normal((rows, vocab_size), np.float32)).tokens)
    answers = search.results()
    return [(tokenizer.decode(list(one.tokens), skip_special_tokens=True), one) for one in answers]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: Path(name).name)
@pytest.mark.parametrize("pattern", REGEXES)
def test_a_text_matches_its_regex(name: str, pattern: str):
    """The byte-fallback decoder strips a space in front, which is no part of the grammar."""
    for options in ({}, {"do_sample": True, "seed": 1}, {"num_beams": 3}):
        for text, answer in say(name, 0, regex=pattern, **options):
            if answer.stop_reason == "stop":
                spaced = " " + text if name == "byte_fallback" else text
                assert re.fullmatch(pattern, text) or re.fullmatch(pattern, spaced)
    assert say(name, 0, regex="(yes|no)")[0][1].stop_reason == "stop"
    assert not re.fullmatch("(yes|no)", say(name, 0, max_new_tokens=9)[0][0])


@pytest.mark.parametrize("name", NAMES, ids=lambda name: Path(name).name)
def test_a_text_is_json_of_its_schema(name: str):
    validate = fastjsonschema.compile(PERSON)
    for seed in range(3):
        for options in ({}, {"do_sample": True, "seed": seed}):
            ((text, answer),) = say(name, seed, json_schema=PERSON, **options)
            assert answer.stop_reason == "stop"
            value = json.loads(text)
            validate(value)
            assert list(value) == ["name", "age", "tags"]
            assert text.startswith('{"name": "')  # laid out as json.dumps does


@pytest.mark.parametrize("name", NAMES, ids=lambda name: Path(name).name)
def test_a_text_matches_its_lark_grammar(name: str):
    grammar = 'start: "it is " /[a-f]{2,4}/ | %json {"type": "boolean"}'
    found = set()
    for seed in range(4):
        ((text, answer),) = say(name, seed, lark_grammar=grammar, do_sample=True, seed=seed)
        assert answer.stop_reason == "stop"
        assert re.fullmatch("it is [a-f]{2,4}|true|false", text.strip())
        found.add(text)
    assert len(found) > 1


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.text("abcé ", min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    beams=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_beams_find_only_what_is_allowed(values: list[str], beams: int, seed: int):
    """Beams that are left without a token are carried along, never returned as finished."""
    pattern = "|".join(re.escape(one) for one in values)
    said = say("shapes", seed, regex=pattern, num_beams=beams, num_return_sequences=beams)
    finished = [text for text, answer in said if answer.stop_reason == "stop"]
    assert finished
    assert set(finished) <= set(values)


def test_a_schema_may_be_text_or_a_pydantic_model():
    class Model:
        @classmethod
        def model_json_schema(cls) -> dict:
            return PERSON

    texts = {
        GenerationOptions(json_schema=one).json_schema
        for one in (PERSON, json.dumps(PERSON), Model)
    }
    assert len(texts) == 1


def mask_of(options: dict) -> Grammar:
    grammar = grammars_of("shapes").of(GenerationOptions(**options))
    assert grammar is not None
    return grammar


def test_after_what_breaks_the_grammar_nothing_may_come():
    tokenizer, stop = tokenizer_of("shapes")
    grammar = mask_of({"regex": "ab"})
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert np.flatnonzero(grammar.mask([])).tolist() == [a]
    assert np.flatnonzero(grammar.mask([a])).tolist() == [b]
    assert np.flatnonzero(grammar.mask([a, b])).tolist() == [stop]
    assert not grammar.mask([b]).any()
    assert not grammar.mask([b, a]).any()
    assert np.flatnonzero(grammar.mask([a, b])).tolist() == [stop]  # in any order
    assert np.flatnonzero(grammar.fresh().mask([a])).tolist() == [b]


def test_what_no_token_spells(tmp_path: Path):
    """A vocabulary of ASCII: the text can begin, but not go on."""
    write_tokenizer(tmp_path, 113)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    grammar = Grammars(tokenizer, 113, (0,)).of(GenerationOptions(regex="aé"))
    a = tokenizer.token_to_id("a")
    assert np.flatnonzero(grammar.mask([])).tolist() == [a]
    assert not grammar.mask([a]).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"[^\s\S]"}, "no text matches it"),
        ({"lark_grammar": "start: nothing"}, "unknown name"),
        ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"json_schema": {"type": "object", "unevaluatedProperties": False}}, "Unimplemented"),
    ],
)
def test_a_grammar_that_is_wrong(options: dict, said: str):
    with raises(OptionError, "grammar.invalid", said) as caught:
        mask_of(options)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_a_long_schema_is_not_said_in_full():
    schema = {"type": "object", "properties": {f"key {i}": {"type": "no"} for i in range(99)}}
    with pytest.raises(OptionError) as caught:
        mask_of({"json_schema": schema})
    assert len(str(caught.value)) < 600
    assert "…" in str(caught.value)


def test_a_schema_that_is_nested_too_deeply():
    schema: dict = {"type": "string"}
    for _ in range(90):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    with raises(OptionError, "grammar.invalid", "json_schema"):
        grammars_of("shapes").of(GenerationOptions(json_schema=schema))


def test_a_tokenizer_that_llguidance_cannot_read():
    with raises(OptionError, "option.not-for-this-model", "llguidance", "Metaspace") as caught:
        Grammars(metaspace(), 6, (0,)).of(GenerationOptions(regex="a"))
    assert caught.value.code == "option.not-for-this-model"
    assert "json_schema and regex" in str(caught.value.hint)


def test_a_tokenizer_whose_ids_have_gaps():
    """One that is read, and can't be written and read again: its words are no longer in order."""
    tokenizer, stop = tokenizer_of("shapes")
    raw = json.loads(tokenizer.to_str())
    raw["model"]["vocab"][next(iter(raw["model"]["vocab"]))] = 2**32 - 1
    odd = Tokenizer.from_str(json.dumps(raw))
    with contextlib.suppress(OptionError):  # others are not caught: none comes through
        Grammars(odd, 349, (stop,)).of(GenerationOptions(regex="a"))


def test_a_model_without_a_stop_token():
    tokenizer, _ = tokenizer_of("shapes")
    with raises(OptionError, "option.not-for-this-model", "stop token"):
        Grammars(tokenizer, 349, (349,)).of(GenerationOptions(regex="a"))


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer, stop = tokenizer_of("shapes")
    grammars = Grammars(tokenizer, 349, (stop,))
    assert grammars.of(GenerationOptions()) is None
    with raises(DependencyError, "dependency.missing") as caught:
        grammars.of(GenerationOptions(regex="a"))
    assert caught.value.hint == "pip install 'vlmport[grammar]'"
