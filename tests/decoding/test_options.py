"""What may be asked for, what contradicts what, and how a call stands over a model's defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from vlmport.errors import OptionError, OptionWarning
from vlmport.runtime.decoding.options import CHECKS, REFUSED, GenerationOptions

NO_DEFAULTS: dict[str, Any] = {}
QWEN = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05}


def merged(defaults: dict[str, Any], **given: Any) -> GenerationOptions:
    return GenerationOptions.merged(defaults, given)


def test_every_option_is_checked_and_documented():
    fields = set(GenerationOptions.__dataclass_fields__)
    assert fields == set(CHECKS)
    assert not fields & set(REFUSED)
    assert GenerationOptions.__doc__
    for name in fields:
        assert f"        {name}: " in GenerationOptions.__doc__


def test_without_options_it_is_greedy_as_transformers_has_it():
    from transformers import GenerationConfig

    options = GenerationOptions()
    theirs = GenerationConfig()._get_default_generation_params()
    for name, value in theirs.items():
        if name in CHECKS and name != "max_length":
            empty = getattr(options, name) in ((), None)
            assert getattr(options, name) == value or (empty and value is None), name


@pytest.mark.parametrize("name", CHECKS)
def test_none_asks_for_nothing(name: str):
    plain = GenerationOptions.of({"top_k": 0})
    assert GenerationOptions.of({"top_k": 0, name: None}) == plain


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.0}, "temperature=0.0, expected a number above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": [1]}, "temperature=[1]"),
        ({"top_p": 0}, "top_p=0, expected a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": -0.1}, "min_p=-0.1, expected a number from 0 to 1"),
        ({"typical_p": 2}, "typical_p=2"),
        ({"top_h": 0}, "top_h=0"),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff=1.0, expected a number from 0 to below 1"),
        ({"top_k": -1}, "top_k=-1, expected a whole number of at least 0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"seed": 2**32}, "seed=4294967296, expected a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed=-1"),
        ({"num_beams": 0}, "num_beams=0, expected a whole number from 1 to 64"),
        ({"num_beams": 1000}, "num_beams=1000"),
        ({"do_sample": 1}, "do_sample=1, expected True or False"),
        (
            {"early_stopping": "always"},
            "early_stopping='always', expected True, False or \"never\"",
        ),
        ({"length_penalty": 9}, "length_penalty=9, expected a number from -5 to 5"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1, expected a number from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3, expected a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0, expected a number above 0"),
        ({"bad_words_ids": [1, 2]}, "bad_words_ids=[1, 2], expected a list of lists of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids=[[]]"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids=[[-1]]"),
        ({"suppress_tokens": [1.5]}, "suppress_tokens=[1.5], expected token ids"),
        ({"suppress_tokens": "5"}, "suppress_tokens='5'"),
        ({"sequence_bias": {(1,): "x"}}, "sequence_bias={(1,): 'x'}"),
        ({"sequence_bias": {(1,): float("inf")}}, "sequence_bias={(1,): inf}"),
        ({"sequence_bias": [[5, 1.0]]}, "sequence_bias=[[5, 1.0]]"),
        ({"exponential_decay_length_penalty": (1,)}, "expected (start, factor)"),
        ({"exponential_decay_length_penalty": (1, -2)}, "exponential_decay_length_penalty[1]=-2"),
        ({"stop_strings": ["a", ""]}, "stop_strings=['a', ''], expected a text or several"),
        ({"stop_strings": 5}, "stop_strings=5"),
        ({"logprobs": True}, "logprobs=True"),
        ({"regex": ""}, "regex='', expected a regular expression"),
        ({"json_schema": "{"}, "json_schema='{', expected a JSON schema"),
        ({"json_schema": "[1]"}, "json_schema='[1]'"),
    ],
)
def test_values_out_of_range(given: dict[str, Any], said: str):
    with pytest.raises(OptionError) as caught:
        GenerationOptions.of({"do_sample": True, **given})
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.5}, "temperature without do_sample=True"),
        ({"top_p": 0.5, "min_p": 0.1}, "top_p and min_p without do_sample=True"),
        ({"seed": 0}, "seed without do_sample=True"),
        ({"num_beams": 3, "top_k": 5}, "top_k without do_sample=True"),
        ({"early_stopping": True}, "early_stopping without beams"),
        ({"length_penalty": 0.5, "num_beams": 1}, "length_penalty without beams"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is more than num_beams=1"),
        ({"num_return_sequences": 4, "num_beams": 3}, "=4 is more than num_beams=3"),
        (
            {"num_return_sequences": 4, "num_beams": 3, "do_sample": True, "seed": 0},
            "=4 is more than num_beams=3",
        ),
        ({"num_beams": 3, "do_sample": True}, "num_beams=3 with do_sample=True, without a seed"),
        ({"max_new_tokens": 5, "max_length": 50}, "max_new_tokens=5 and max_length=50"),
        ({"min_new_tokens": 5, "min_length": 50}, "min_new_tokens=5 and min_length=50"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 is more than max_length=8"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than"),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "prompt_lookup_num_tokens with several"),
        ({"forced_eos_token_id": 3, "suppress_tokens": [2, 3]}, "forced_eos_token_id=[3] is in"),
    ],
)
def test_contradictions(given: dict[str, Any], said: str):
    with pytest.raises(OptionError) as caught:
        GenerationOptions.of(given)
    assert said in str(caught.value)
    assert caught.value.hint
    with pytest.raises(OptionError):
        GenerationOptions.merged({}, given)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name: str):
    with raises(OptionError, "option.unsupported", f"{name}=7") as caught:
        GenerationOptions.of({name: 7})
    assert caught.value.hint
    with pytest.warns(OptionWarning, match=f"_config.json: option {name}=7 is not supported; left"):
        assert merged({name: 7}) == GenerationOptions()
    for neutral in REFUSED[name][0]:
        assert merged({name: 7}, **{name: neutral}) == GenerationOptions()
        assert merged({name: neutral}) == GenerationOptions()


def test_values_are_tidied():
    options = GenerationOptions.of(
        {
            "do_sample": np.bool_(True),
            "temperature": np.float32(0.5),
            "top_k": np.int64(7),
            "suppress_tokens": np.array([3, 5, 3]),
            "bad_words_ids": [np.array([1, 2]), [3], (3,)],
            "sequence_bias": {(1, 2): 1, (3,): float("-inf")},
            "forced_eos_token_id": 4,
            "stop_strings": "\n\n",
            "exponential_decay_length_penalty": [3, 1],
            "json_schema": {"type": "object"},
        }
    )
    assert (options.do_sample, options.temperature, options.top_k) == (True, 0.5, 7)
    assert options.suppress_tokens == (3, 5)
    assert options.bad_words_ids == ((1, 2), (3,))
    assert options.sequence_bias == (((1, 2), 1.0), ((3,), float("-inf")))
    assert options.forced_eos_token_id == (4,)
    assert options.stop_strings == ("\n\n",)
    assert options.exponential_decay_length_penalty == (3, 1.0)
    assert options.json_schema == '{"type": "object"}'
    assert hash(options) == hash(options)


def test_defaults_apply_and_the_call_wins():
    assert merged(QWEN) == GenerationOptions(
        do_sample=True, temperature=1e-6, repetition_penalty=1.05
    )
    assert merged(QWEN, temperature=0.7).temperature == 0.7
    assert merged(QWEN, temperature=None).temperature == 1.0
    assert merged(QWEN, repetition_penalty=None).repetition_penalty == 1.0
    assert merged({}, do_sample=True).top_k == 50
    assert merged({}, do_sample=True, top_k=None).top_k == 0
    assert merged({"top_k": 20, "do_sample": True}).top_k == 20
    assert merged({"chat_format": "x", "max_context": 7}) == GenerationOptions()


@pytest.mark.parametrize(
    ("defaults", "given"),
    [
        (QWEN, {"do_sample": False}),
        (QWEN, {"do_sample": False, "num_beams": 4}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 0}, {}),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, {"num_beams": 1}),
        ({"num_beams": 4, "num_return_sequences": 4}, {"num_beams": 2}),
        ({"do_sample": True, "num_return_sequences": 4}, {"do_sample": False}),
        ({"do_sample": True, "num_return_sequences": 4}, {"num_beams": 2}),
        ({"max_new_tokens": 50}, {"max_length": 20}),
        ({"min_new_tokens": 50}, {"max_new_tokens": 20}),
        ({"min_length": 50}, {"max_length": 20}),
        ({"min_length": 50}, {"min_new_tokens": 20}),
        ({"min_length": 5, "min_new_tokens": 2, "max_length": 9, "max_new_tokens": 7}, {}),
        ({"prompt_lookup_num_tokens": 3}, {"num_beams": 2}),
        ({"num_beams": 3, "do_sample": True}, {}),
        ({"min_new_tokens": 10, "max_new_tokens": 5}, {}),
        ({"min_new_tokens": 10}, {"min_length": 20}),
        ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, {}),
        ({"forced_eos_token_id": 5}, {"suppress_tokens": (5,)}),
        ({"suppress_tokens": [5]}, {"forced_eos_token_id": (5,)}),
        ({"regex": "a"}, {"json_schema": '{"type": "null"}'}),
        ({"json_schema": "{}"}, {"regex": "a"}),
    ],
)
def test_defaults_never_make_a_call_fail(defaults: dict[str, Any], given: dict[str, Any]):
    options = merged(defaults, **given)
    for name, value in given.items():
        assert getattr(options, name) == value


def test_defaults_that_say_otherwise_leave_greedy():
    assert merged(QWEN, do_sample=False, repetition_penalty=1.0) == GenerationOptions()
    # transformers counts image tokens too, and leaves a captioner nothing
    assert merged({"max_length": 20}) == GenerationOptions()


def test_beams_that_draw_by_default_get_a_seed():
    """The call did not ask for both: it is not the call's fault. The seed is reported."""
    seeds = {merged(QWEN, num_beams=3).seed for _ in range(20)}
    assert None not in seeds
    assert len(seeds) > 15
    assert merged(QWEN, num_beams=3, seed=5).seed == 5


@pytest.mark.parametrize(
    ("defaults", "said", "left"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0, expected", {"do_sample": True}),
        ({"num_beams": 100, "length_penalty": 0.5}, "num_beams=100, expected", {}),
        ({"do_sample": "yes", "temperature": 0.5}, "do_sample='yes', expected", {}),
        ({"guidance_scale": 3.0}, "option guidance_scale=3.0 is not supported", {}),
        ({"top_k": -1, "do_sample": True}, "top_k=-1, expected", {"do_sample": True}),
        ({"suppress_tokens": [-1], "min_new_tokens": 2}, "suppress_tokens", {"min_new_tokens": 2}),
    ],
)
def test_a_default_that_cannot_be_served_is_left_out_and_named(
    defaults: dict[str, Any], said: str, left: dict[str, Any]
):
    with pytest.warns(OptionWarning) as caught:
        assert merged(defaults) == GenerationOptions.of(left)
    (warning,) = caught
    assert str(warning.message).startswith(f"generation_config.json: {said}")
    assert str(warning.message).endswith("; left out")


def test_a_wrong_default_that_has_no_meaning_is_not_worth_a_word():
    assert merged({"temperature": 0.0, "length_penalty": 9, "max_length": -1}) == (
        GenerationOptions()
    )
    assert merged({"temperature": 0.0}, do_sample=True, temperature=0.5).temperature == 0.5
    assert merged({"guidance_scale": 3.0}, guidance_scale=None) == GenerationOptions()


def test_a_default_that_a_model_cannot_serve_is_left_out():
    def check(name: str, value: Any) -> None:
        if name == "bad_words_ids" and value == ((7,),):
            raise OptionError("no 7", code="option.wrong-value")

    defaults = {"bad_words_ids": [[7]], "suppress_tokens": [7]}
    with pytest.warns(OptionWarning, match="no 7; left out"):
        options = GenerationOptions.merged(defaults, {}, check)
    assert (options.bad_words_ids, options.suppress_tokens) == ((), (7,))
    options = GenerationOptions.merged(defaults, {"bad_words_ids": [[7]]}, check)
    assert options.bad_words_ids == ((7,),)  # the call's own is refused where it runs


def test_lengths_that_count_the_prompt():
    assert GenerationOptions(max_length=50).max_new_tokens_after(20) == 30
    assert GenerationOptions(max_length=50).max_new_tokens_after(60) == 0
    assert GenerationOptions(7).max_new_tokens_after(60) == 7
    assert GenerationOptions().max_new_tokens_after(60) is None
    assert GenerationOptions(min_length=50).min_new_tokens_after(20) == 30
    assert GenerationOptions(min_length=50).min_new_tokens_after(60) == 0
    assert GenerationOptions(min_new_tokens=4).min_new_tokens_after(20) == 4
