"""Every option, alone and with others, gives transformers' own tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.decoding import reference
from tests.decoding.running import Request, compare
from tests.decoding.tables import table
from vlmport.errors import OptionError

# Options that look at tokens, and change the scores of all ways to decode.
PROCESSORS: dict[str, list[Any]] = {
    "sequence_bias": [
        [[[3], 2.0], [[4, 5], 3.0], [[6, 5], -4.5], [[2, 7, 5], float("-inf")]],
        {(2,): -1.0, (2, 2): 5.0, (1, 2, 3): 2.5},
    ],
    "encoder_repetition_penalty": [1.3, 0.7],
    "repetition_penalty": [1.2, 3.0, 0.8],
    "no_repeat_ngram_size": [1, 2, 3],
    "encoder_no_repeat_ngram_size": [1, 2],
    "bad_words_ids": [[[5], [2, 3], [7, 7, 7]], [[0], [4]]],
    "min_new_tokens": [1, 7],
    "min_length": [3, 9],
    "forced_eos_token_id": [0, [0, 3]],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [(2, 1.5), (0, 1.05)],
    "suppress_tokens": [[0, 2, 5], [9]],
    "begin_suppress_tokens": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "renormalize_logits": [True],
}
# Options that narrow what is drawn.
WARPERS: dict[str, list[Any]] = {
    "temperature": [0.5, 1.7, 1e-6],
    "top_h": [0.37, 0.83],
    "top_k": [0, None, 1, 5, 100],
    "top_p": [0.3, 0.9, 0.999],
    "min_p": [0.0, 0.07, 0.4, 1.0],
    "typical_p": [0.2, 0.7, 0.95],
    "epsilon_cutoff": [0.0123, 0.3],
    "eta_cutoff": [0.0123, 0.3],
}
BEAMS: dict[str, list[Any]] = {
    "early_stopping": [True, False, "never"],
    "length_penalty": [-1.5, 0.0, 0.7, 2.0],
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 11, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "seed": 5},
}
NEEDS_PROMPT = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")


def flat(choices: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in choices.items() for value in values]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "value", "see"),
    [
        (name, value, see)
        for name, value in flat(PROCESSORS)
        for see in (True, False)
        if see or name not in NEEDS_PROMPT
    ],
)
def test_one_processor(name: str, value: Any, see: bool, mode: str):
    request = Request(
        {**MODES[mode], name: value}, processors_see_prompt=see, stop_token_ids=(0, 6)
    )
    compare(request, table(len(str(value))))


@pytest.mark.parametrize("mode", ["sampling", "beam sampling"])
@pytest.mark.parametrize(("name", "value"), flat(WARPERS))
def test_one_warper(name: str, value: Any, mode: str):
    compare(Request({"top_k": 0, **MODES[mode], name: value}), table(0, 40, scale=1.5))


@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
@pytest.mark.parametrize(("name", "value"), flat(BEAMS))
def test_one_beam_option(name: str, value: Any, num_beams: int):
    ended = set()
    for seed, stops in enumerate([(0,), (0, 1), (0, 5, 9)]):
        request = Request(
            {"num_beams": num_beams, "num_return_sequences": num_beams, name: value},
            stop_token_ids=stops,
        )
        search = compare(request, table(seed, 12, scale=1.0 + seed))
        ended.update(one.stop_reason for one in search.results())
    assert "stop" in ended  # some beams finish early


def test_the_seven_ways_to_narrow_stand_in_the_order_of_transformers():
    """One after the other they narrow differently than in any other order, so this can fail."""
    options = {name: values[0] for name, values in WARPERS.items()} | {"top_k": 9, "top_p": 0.7}
    for seed in range(8):
        compare(Request({**MODES["sampling"], **options}), table(seed, 40, scale=0.7))


def test_what_lies_on_an_edge():
    """Ten equal tokens: 0.9 of their probability is nine of them, and each is as likely as the
    best."""
    for option in ({"top_p": 0.9}, {"min_p": 1.0}, {"top_k": 3}, {"typical_p": 0.5}):
        for mode in ("sampling", "beam sampling"):
            compare(Request({**MODES[mode], **option}), table(0, 10, flat=61))


def test_stopping_never_early_when_short_ones_are_preferred():
    """Then the best that a beam can become is at its present length."""
    options = {"num_beams": 3, "num_return_sequences": 3}
    options |= {"early_stopping": "never", "length_penalty": -1.5}
    for seed in range(16, 20):  # of which 18 shows it
        compare(Request(options), table(seed, 5))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any options that may stand together."""
    samples, num_beams = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3, 4, 5]))
    options: dict[str, Any] = {}
    choices = dict(PROCESSORS)
    if samples:
        choices |= WARPERS
        options |= {"do_sample": True, "seed": draw(st.integers(0, 2**32 - 1))}
    if num_beams > 1:
        choices |= BEAMS
        options["num_beams"] = num_beams
    most = num_beams if num_beams > 1 else 3 if samples else 1
    options["num_return_sequences"] = draw(st.integers(1, most))
    names = draw(st.lists(st.sampled_from(sorted(choices)), max_size=7, unique=True))
    options |= {name: draw(st.sampled_from(choices[name])) for name in names}
    if "min_new_tokens" in options:
        options.pop("min_length", None)
    if num_beams > 1 and options.get("temperature") == 1e-6:
        # Nearly all probabilities are 0 then. Of those transformers keeps any for min_p, we the
        # best; and scores in the millions tell float32's sums apart.
        options["temperature"] = 0.5
    if "forced_eos_token_id" in options or "exponential_decay_length_penalty" in options:
        options.pop("remove_invalid_values", None)  # float32 overflows there, see test_search.py
    if "suppress_tokens" in options:
        options.pop("forced_eos_token_id", None)
    see = draw(st.booleans())
    if not see:
        options = {name: value for name, value in options.items() if name not in NEEDS_PROMPT}
    return Request(
        options,
        prompt_ids=draw(st.lists(st.integers(0, 12), min_size=1, max_size=6)),
        processors_see_prompt=see,
        stop_token_ids=draw(st.sampled_from([(0,), (0, 6), (0, 4, 9)])),
        pad_token_id=draw(st.sampled_from([0, 2])),
        max_new_tokens=draw(st.integers(1, 12)),
    )


def tables() -> st.SearchStrategy[reference.Table]:
    """Any logits, awkward ones too."""
    return st.builds(
        table,
        st.integers(0, 2**16),
        st.integers(13, 60),
        scale=st.sampled_from([0.3, 1.0, 3.0]),
        equal=st.sampled_from([0, 0, 3]),
        flat=st.sampled_from([0, 0, 9]),
        forbidden=st.sampled_from([0.0, 0.0, 0.2, 0.8]),
    )


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(request=requests(), logits=tables())
def test_options_together(request: Request, logits: reference.Table):
    compare_if_any(request, logits)


def compare_if_any(request: Request, logits: reference.Table) -> None:
    """Compare, but where the options leave no token to choose."""
    try:
        compare(request, logits)
    except OptionError as error:  # transformers goes on with token 0, or fails in torch
        if "leave no token" not in str(error):
            raise
        assume(False)


NOWHERE = {"num_beams": 3, "num_return_sequences": 2, "bad_words_ids": [[5], [2, 3]]}
DRAWN = {"do_sample": True, "seed": 1, "top_k": 0}


@pytest.mark.parametrize(
    "option",
    [{"renormalize_logits": True}, {**DRAWN, "eta_cutoff": 0.01}, {**DRAWN, "top_h": 0.9}],
    ids=str,
)
def test_a_beam_that_may_go_nowhere_is_no_number_in_transformers(option: dict[str, Any]):
    """There the log-probabilities of such a row become NaN, which count as the best, or an entropy
    fails. Here the beam ends, and others go on."""
    request = Request({**NOWHERE, **option}, max_new_tokens=4)
    logits = table(0, 6).rows.copy()
    logits[31 + 2, :5] = -np.inf  # after token 2 only 5 is left, which is a bad word
    narrow = reference.Table(logits)
    try:
        fails = np.isnan(request.expected(narrow).totals).any()
    except ValueError:
        fails = True
    assert fails
    found = compare(request, narrow).results()
    assert all(one.score is not None and one.score > -100 for one in found)
    assert 5 not in {token for one in found for token in one.tokens}


def test_logits_of_a_few_tokens_only():
    """Fewer tokens than beams want continuations: the rest come from beams that do not count."""
    for seed in range(20):
        compare(Request({"num_beams": 5, "num_return_sequences": 2}), table(seed, 4, scale=1.0))


def test_a_wide_vocabulary():
    for options in (
        MODES["beams"],
        MODES["sampling"],
        MODES["sampling"] | {"top_k": 0, "top_p": 0.95},
        MODES["beam sampling"] | {"top_k": 0, "top_p": 0.95},
    ):
        compare(Request(options, max_new_tokens=5), table(1, 5000, rows=17))


def test_without_equals_torchs_own_order_will_do(monkeypatch: pytest.MonkeyPatch):
    """Our order of equals is all that the reference's topk and sort add to torch's."""
    monkeypatch.setattr(reference, "_topk", torch.topk)
    monkeypatch.setattr(reference, "_sort", torch.sort)
    options = {"top_k": 0, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
    for mode, base in MODES.items():
        for seed in range(5):
            own = {**base, **(options if "sampling" in mode else {})}
            compare(Request(own), table(seed, 200))


def test_a_stop_string_ends_beams_and_samples():
    def is_stopped(tokens: Any) -> bool:
        return len(tokens) > 2 and (tokens[-1] + tokens[-2]) % 5 == 0

    for mode in MODES.values():
        search = compare(Request(mode, is_stopped=is_stopped), table(3))
        assert "stop_string" in {one.stop_reason for one in search.results()}


def test_a_mask_stands_where_prefix_allowed_tokens_fn_does():
    def mask(tokens: Any) -> np.ndarray:
        allowed = np.zeros(24, np.bool_)
        allowed[len(tokens) % 3 :: 3] = True
        return allowed

    for mode in MODES.values():
        options = {**mode, "repetition_penalty": 1.4, "suppress_tokens": [3, 4]}
        search = compare(Request(options, mask=mask, stop_token_ids=(23,)), table(4))
        for one in search.results():
            assert all(token % 3 == n % 3 for n, token in enumerate(one.tokens))
