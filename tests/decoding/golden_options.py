"""Options over defaults, and what Python makes of them, for another language to equal."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from vlmport.errors import OptionError, OptionWarning
from vlmport.runtime.decoding.options import CHECKS, DEFAULTS, GenerationOptions

QWEN = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05}
NOT_IN_WEB = ("json_schema", "lark_grammar", "regex")

WRONG: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 2.5, "5", True],
    "min_new_tokens": [-1],
    "max_length": [0],
    "min_length": [-1],
    "stop_strings": [["a", ""], 5, [5], ""],
    "do_sample": [1, "yes"],
    "num_beams": [0, 1000, 2.5],
    "num_return_sequences": [0, 65],
    "seed": [2**32, -1],
    "early_stopping": ["always", 1],
    "length_penalty": [9, -5.5, "1"],
    "sequence_bias": [[[5, 1.0]], [[[1], "x"]], [[[], 1.0]], 5],
    "encoder_repetition_penalty": [0],
    "repetition_penalty": [0, -1, "x"],
    "presence_penalty": [-2.5, "1"],
    "frequency_penalty": [2.5, True],
    "no_repeat_ngram_size": [-1],
    "encoder_no_repeat_ngram_size": [1.5],
    "bad_words_ids": [[1, 2], [[]], [[-1]], 5, "5"],
    "forced_eos_token_id": ["5", [1.5], -1],
    "remove_invalid_values": [0],
    "exponential_decay_length_penalty": [[1], [1, -2], [-1, 2], 3],
    "suppress_tokens": [[1.5], "5", [[5]]],
    "begin_suppress_tokens": [[-1]],
    "temperature": [0.0, -1, "hot", True, [1]],
    "top_h": [0, 1.5],
    "top_k": [-1, 2.5],
    "top_p": [0, 1.01],
    "min_p": [-0.1, 1.1],
    "typical_p": [2],
    "epsilon_cutoff": [1.0, -0.1],
    "eta_cutoff": [1.0],
    "renormalize_logits": ["no"],
    "logprobs": [True, -1],
    "prompt_lookup_num_tokens": [0],
    "max_matching_ngram_size": [0],
    "skip_special_tokens": [1],
}
RIGHT: dict[str, list[Any]] = {
    "max_new_tokens": [1, 300],
    "min_new_tokens": [4],
    "max_length": [50],
    "min_length": [5],
    "stop_strings": ["\n\n", ["a", "b", "a"]],
    "num_beams": [64],
    "sequence_bias": [[[[5, 17], -2.0], [[5, 17], 1]], [[[3], 2.5]]],
    "encoder_repetition_penalty": [1.3],
    "presence_penalty": [0.5],
    "frequency_penalty": [-2],
    "no_repeat_ngram_size": [2],
    "bad_words_ids": [[[1, 2], [3], [3]]],
    "forced_eos_token_id": [4, [4, 5]],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [[3, 1]],
    "suppress_tokens": [[3, 5, 3], 7],
    "logprobs": [0, 5],
    "prompt_lookup_num_tokens": [10],
    "skip_special_tokens": [False],
}
TOGETHER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"temperature": 0.5}),
    ({}, {"top_p": 0.5, "min_p": 0.1}),
    ({}, {"seed": 0}),
    ({}, {"num_beams": 3, "top_k": 5}),
    ({}, {"early_stopping": True}),
    ({}, {"length_penalty": 0.5, "num_beams": 1}),
    ({}, {"num_return_sequences": 2}),
    ({}, {"num_return_sequences": 4, "num_beams": 3}),
    ({}, {"num_return_sequences": 4, "num_beams": 3, "do_sample": True, "seed": 0}),
    ({}, {"num_return_sequences": 4, "do_sample": True, "seed": 0}),
    ({}, {"num_beams": 3, "do_sample": True}),
    ({}, {"max_new_tokens": 5, "max_length": 50}),
    ({}, {"min_new_tokens": 5, "min_length": 50}),
    ({}, {"min_length": 9, "max_length": 8}),
    ({}, {"min_new_tokens": 9, "max_new_tokens": 8}),
    ({}, {"prompt_lookup_num_tokens": 3, "num_beams": 2}),
    ({}, {"forced_eos_token_id": 3, "suppress_tokens": [2, 3]}),
    ({}, {"do_sample": True}),
    ({}, {"do_sample": True, "top_k": None}),
    ({"top_k": 20, "do_sample": True}, {}),
    ({"chat_format": "x", "max_context": 7}, {}),
    (QWEN, {}),
    (QWEN, {"temperature": 0.7}),
    (QWEN, {"temperature": None}),
    (QWEN, {"repetition_penalty": None}),
    (QWEN, {"do_sample": False}),
    (QWEN, {"do_sample": False, "num_beams": 4}),
    (QWEN, {"num_beams": 3}),
    (QWEN, {"num_beams": 3, "seed": 5}),
    ({"do_sample": False, "temperature": 0.0, "top_p": 0}, {}),
    ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, {"num_beams": 1}),
    ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, {}),
    ({"num_beams": 4, "num_return_sequences": 4}, {"num_beams": 2}),
    ({"do_sample": True, "num_return_sequences": 4}, {"do_sample": False}),
    ({"do_sample": True, "num_return_sequences": 4}, {"num_beams": 2}),
    ({"max_new_tokens": 50}, {"max_length": 20}),
    ({"max_length": 20}, {}),
    ({"min_new_tokens": 50}, {"max_new_tokens": 20}),
    ({"min_length": 50}, {"max_length": 20}),
    ({"min_length": 50}, {"min_new_tokens": 20}),
    ({"min_length": 5, "min_new_tokens": 2, "max_length": 9, "max_new_tokens": 7}, {}),
    ({"prompt_lookup_num_tokens": 3}, {"num_beams": 2}),
    ({"num_beams": 3, "do_sample": True}, {}),
    ({"min_new_tokens": 10, "max_new_tokens": 5}, {}),
    ({"min_new_tokens": 10}, {"min_length": 20}),
    ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, {}),
    ({"forced_eos_token_id": 5}, {"suppress_tokens": [5]}),
    ({"suppress_tokens": [5]}, {"forced_eos_token_id": [5]}),
    ({"do_sample": True, "temperature": 0.0}, {}),
    ({"num_beams": 100, "length_penalty": 0.5}, {}),
    ({"do_sample": "yes", "temperature": 0.5}, {}),
    ({"guidance_scale": 3.0}, {}),
    ({"guidance_scale": 3.0}, {"guidance_scale": None}),
    ({"top_k": -1, "do_sample": True}, {}),
    ({"suppress_tokens": [-1], "min_new_tokens": 2}, {}),
    ({"temperature": 0.0, "length_penalty": 9, "max_length": -1}, {}),
    ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.5}),
    ({"temperature": 0.0}, {"do_sample": True}),
    ({}, {"unheard_of": 1}),
]


def cases() -> Iterator[dict[str, Any]]:
    """All cases, with what Python makes of each."""
    assert set(WRONG) == set(CHECKS) - set(NOT_IN_WEB)
    for values in (WRONG, RIGHT):
        for name, several in values.items():
            for value in several:
                yield outcome({}, {name: value})
    for defaults, given in TOGETHER:
        yield outcome(defaults, given)


def outcome(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """One case: the options that differ from the defaults, or the code of the error."""
    case: dict[str, Any] = {"defaults": dict(defaults), "given": dict(given)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OptionWarning)
        try:
            options = GenerationOptions.merged(defaults, given)
        except OptionError as error:
            return {**case, "code": error.code}
    found = dataclasses.asdict(options)
    changed = {name: value for name, value in found.items() if value != DEFAULTS[name]}
    if options.seed is not None and "seed" not in given:
        changed["seed"] = "drawn"
    left_out = [name for one in caught for name in defaults if name in str(one.message)]
    return {**case, "options": changed, "left_out": left_out}
