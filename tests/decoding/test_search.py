"""What callers rely on: batches, interrupts, reports, and clear errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.decoding.running import Request, assert_equal, compare, logits_for, rows_of, run
from tests.decoding.tables import table
from tests.errors import raises
from vlmport.errors import DeviceError, OptionError
from vlmport.runtime.decoding.search import Choice

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 1, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True, "seed": 2},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def test_a_batch_mixes_requests():
    """Searches that take turns do not know of each other: each gives what it gives alone."""
    logits = table(5)
    requests = [
        Request({}),
        Request({"do_sample": True, "seed": 1, "temperature": 0.7, "num_return_sequences": 2}),
        Request({"num_beams": 4, "repetition_penalty": 1.3}, prompt_ids=(7, 7, 3)),
        Request({"num_beams": 2, "do_sample": True, "seed": 1}, processors_see_prompt=False),
        Request({"no_repeat_ngram_size": 1, "min_new_tokens": 6}, max_new_tokens=7),
    ]
    searches = [request.search(logits) for request in requests]
    while any(not search.done for search in searches):
        for search in searches:
            if not search.done:
                search.choose(logits_for(logits, search))
    for request, search in zip(requests, searches, strict=True):
        assert_equal(search, request.expected(logits))


@every_mode
def test_an_interrupt_leaves_the_search_as_it_was(options: dict[str, Any]):
    """Anywhere in a step: it can be repeated, and the answer is the same."""
    logits = table(2, scale=0.7)
    whole = run(Request(options).search(logits), logits).results()
    asked = 0

    def interrupting(tokens: Any) -> np.ndarray:
        nonlocal asked
        asked += 1
        if asked % 5 == 0:  # more than a step asks, so that each ends at last
            raise KeyboardInterrupt
        return np.ones(24, np.bool_)

    search = Request(options, mask=interrupting).search(logits)
    interrupts = 0
    while not search.done:
        before = (search.steps, search.last, rows_of(search), search.results())
        try:
            choice = search.choose(logits_for(logits, search))
        except KeyboardInterrupt:
            interrupts += 1
            assert before == (search.steps, search.last, rows_of(search), search.results())
        else:
            assert (search.steps, search.last) == (before[0] + 1, choice)
    assert interrupts > 1
    assert search.results() == whole


@every_mode
def test_results_before_the_end_are_what_there_is(options: dict[str, Any]):
    logits = table(2, scale=0.7)
    search = Request(options, stop_token_ids=(0, 5, 9)).search(logits)
    assert (search.results(), search.steps, search.last) == ([], 0, None)
    seen_unfinished = False
    while not search.done:
        search.choose(logits_for(logits, search))
        found = search.results()
        assert len(found) == options.get("num_return_sequences", 1)
        for one in found:
            ended = one.tokens[-1] in (0, 5, 9)
            assert one.stop_reason == (
                "stop" if ended else "length" if len(one.tokens) == 10 else None
            )
            seen_unfinished |= one.stop_reason is None
        if "num_beams" in options:
            scores = [one.score for one in found]
            assert scores == sorted(scores, reverse=True)
    assert seen_unfinished
    assert search.last == Choice((), ())
    assert rows_of(search) == ()


@every_mode
def test_log_probabilities_are_those_of_the_raw_logits(options: dict[str, Any]):
    logits = table(6)
    request = Request({**options, "repetition_penalty": 1.5, "logprobs": 3})
    for one in run(request.search(logits), logits).results():
        assert one.logprobs is not None
        assert len(one.logprobs) == len(one.tokens)
        for n, place in enumerate(one.logprobs):
            raw = logits(one.tokens[:n]).astype(np.float64)
            expected = raw - np.log(np.exp(raw).sum())
            assert place.token == one.tokens[n]
            assert place.logprob == pytest.approx(expected[place.token], abs=1e-6)
            order = np.argsort(-raw, kind="stable")[:3]
            assert [token for token, _ in place.top] == order.tolist()
            assert [value for _, value in place.top] == pytest.approx(expected[order], abs=1e-6)
    plain = run(Request({**options, "logprobs": 0}).search(logits), logits).results()[0]
    assert plain.logprobs is not None
    assert plain.logprobs[0].top == ()
    assert run(Request(options).search(logits), logits).results()[0].logprobs is None


def test_a_sequence_of_several_is_the_one_that_is_drawn_alone():
    """Each has its own stream: more of them do not change the first."""
    logits = table(3, scale=0.8)
    alone = run(Request({"do_sample": True, "seed": 9}).search(logits), logits).results()
    several = Request({"do_sample": True, "seed": 9, "num_return_sequences": 4})
    found = run(several.search(logits), logits).results()
    assert found[:1] == alone
    assert len({one.tokens for one in found}) == 4


def test_a_seed_that_nobody_gave_is_reported():
    logits = table(3, scale=0.5)
    search = run(Request({"do_sample": True}).search(logits), logits)
    again = run(Request({"do_sample": True, "seed": search.seed}).search(logits), logits)
    assert search.results() == again.results()
    assert Request({}).search(logits).seed is None
    assert Request({"do_sample": True, "seed": 0}).search(logits).seed == 0


@every_mode
def test_logits_are_left_alone(options: dict[str, Any]):
    logits = table(4)
    request = Request({**options, "repetition_penalty": 1.2, "suppress_tokens": [1]})
    search = request.search(logits)
    rows = np.stack([logits(())])
    rows.flags.writeable = False
    search.choose(rows)


@every_mode
@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
def test_broken_logits_are_the_decoders_fault(options: dict[str, Any], bad: Any):
    logits = table(4)
    search = Request(options).search(logits)
    rows = np.stack([logits(())])
    rows[0, 5] = bad if bad != "all -inf" else 0
    if bad == "all -inf":
        rows[:] = -np.inf
    with raises(DeviceError, "device.not-finite", "0"):
        search.choose(rows)
    assert search.steps == 0


@every_mode
def test_options_that_leave_no_token_say_so(options: dict[str, Any]):
    logits = table(4)
    request = Request({**options, "suppress_tokens": list(range(24))})
    with raises(OptionError, "option.no-token-left", "0") as caught:
        run(request.search(logits), logits)
    assert caught.value.hint


def test_some_logits_may_be_minus_infinity():
    """As of a vocabulary that is padded to a round number."""
    for options in MODES.values():
        compare(Request(options), table(7, forbidden=0.7))


def test_beams_find_no_more_than_there_is():
    """Two texts fit: two answers come, whatever was asked for, and none that never counted."""

    def mask(tokens: Any) -> np.ndarray:
        allowed = np.zeros(24, np.bool_)
        allowed[[0] if tokens else [3, 5]] = True
        return allowed

    logits = table(8)
    options = {"num_beams": 4, "num_return_sequences": 4}
    search = run(Request(options, mask=mask).search(logits), logits)
    assert {one.tokens for one in search.results()} == {(3, 0), (5, 0)}
    assert all(one.score is not None and one.score > -100 for one in search.results())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bad_words_ids": [[3, 24]]}, "bad_words_ids: 24 not in a vocabulary of 24 tokens"),
        ({"sequence_bias": [[[30], 1.0], [[25], 1.0]]}, "sequence_bias: 25, 30 not in"),
        ({"forced_eos_token_id": 99}, "forced_eos_token_id: 99 not in"),
    ],
)
def test_ids_outside_the_vocabulary(options: dict[str, Any], said: str):
    with pytest.raises(OptionError, match=said):
        Request(options).search(table())


def test_suppressed_ids_may_stand_outside_the_vocabulary():
    compare(Request({"suppress_tokens": [2, 99], "begin_suppress_tokens": [4, 24]}), table(1))


@pytest.mark.parametrize(
    "options", [{"encoder_repetition_penalty": 1.2}, {"encoder_no_repeat_ngram_size": 2}]
)
def test_options_of_the_prompt_need_one(options: dict[str, Any]):
    """transformers warns and goes on without them."""
    with raises(
        OptionError,
        "option.not-for-this-model",
        *(f"{name}={value}" for name, value in options.items()),
    ):
        Request(options, processors_see_prompt=False).search(table())


def test_a_growing_penalty_never_overflows():
    """transformers' scores become infinite here: it takes the stop token when greedy, and fails in
    torch when it draws."""
    options = {"exponential_decay_length_penalty": (1, 1e20), "bad_words_ids": [[3]]}
    for mode in MODES.values():
        search = run(
            Request({**mode, **options}, stop_token_ids=(9,), max_new_tokens=30).search(table(5)),
            table(5),
        )
        assert search.results()[0].tokens[-1] == 9
        assert len(search.results()[0].tokens) < 5


def test_stop_tokens_outside_the_vocabulary_say_nothing():
    compare(Request({"min_new_tokens": 4}, stop_token_ids=(0, 99)), table(1))


def test_one_new_token():
    for options in MODES.values():
        compare(Request(options, max_new_tokens=1), table(2))
