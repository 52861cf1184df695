"""How generated tokens are judged: what differs, and what the reference thinks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests.errors import raises
from vlmport.bundle import Manifest
from vlmport.errors import ImageError, VlmportError
from vlmport.parity import judging
from vlmport.parity.judging import BrokenError, Judge, bundle_runs, max_new_tokens, row_of
from vlmport.parity.limits import Limit
from vlmport.parity.protocol import Generated, Reference
from vlmport.parity.report import GRAPH_FAILS, PAST_LIMIT
from vlmport.parity.truth import Truth
from vlmport.runtime.graphs.sessions import ORT_ERRORS

VOCAB, STOP, IMAGE = 20, 2, 19
PROMPT = (1, 3)
MOST = 6  # new tokens, the bundle's default
LEAD = 4.0  # of the reference's first choice over its second, and of that over all others


@dataclass
class Chain:
    """A reference that says, after each token, the next number, and likes the one after it second.

    Attributes:
        fed: the ids of its last pass.
    """

    stop_token_ids: tuple[int, ...] = (STOP,)
    fed: tuple[int, ...] = ()

    def embeds(self, ids: np.ndarray, features: np.ndarray) -> np.ndarray:
        self.fed = tuple(ids.tolist())
        return np.asarray(ids, "f4")[:, None]

    def position_ids(self, ids: np.ndarray, pictures: Any = ()) -> np.ndarray:
        return np.arange(len(ids))

    def logits(self, embeds: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        assert len(embeds) == len(position_ids)
        return after(embeds[:, 0].astype(int).tolist())


def after(ids: Sequence[int]) -> np.ndarray:
    logits = np.zeros((len(ids), VOCAB), np.float32)
    for row, token in zip(logits, ids, strict=True):
        row[(token + 1) % VOCAB] = 2 * LEAD
        row[(token + 2) % VOCAB] = LEAD
    return logits


def judge(truth: Sequence[int], *, is_cut: bool = False, **changes: Any) -> Judge:
    tokens = np.array(truth, np.int64)
    made = Generated(tokens, after([PROMPT[-1], *truth[:-1]]))
    told = SimpleNamespace(
        made=made, is_cut=is_cut, prompt_ids=np.array(PROMPT), features=None, pixels=[]
    )
    manifest = manifest_of(**changes)
    reference = cast(Reference, Chain())
    return Judge(reference, cast(Truth, told), manifest, lambda at: made.logits[at])


def manifest_of(most: int = MOST, stops: Sequence[int] = (STOP,)) -> Manifest:
    generation = SimpleNamespace(max_new_tokens=most, stop_token_ids=tuple(stops))
    prompt = SimpleNamespace(image_token_id=IMAGE)
    return cast(Manifest, SimpleNamespace(generation=generation, prompt=prompt))


def regret(tokens: Sequence[int], truth: Sequence[int], **settings: Any) -> float:
    return judge(truth, **settings).tokens(tokens)[0]["regret"]


def test_equal_tokens_cost_nothing_and_ask_nothing() -> None:
    one = judge((4, 5, 6))
    assert one.tokens([4, 5, 6]) == ({"wrong": 0, "regret": 0}, None)
    assert cast(Chain, one.reference).fed == ()


def test_where_tokens_part_is_said_with_both_margins() -> None:
    one = judge((4, 5, 6, 7, 8, 9))
    values, detail = one.tokens([4, 6, 7, 8, 9, 10])
    assert values["wrong"] == 5
    assert cast(Chain, one.reference).fed == (*PROMPT, 4, 6, 7, 8, 9)
    assert detail == f"token 1: 6 (bundle's margin {LEAD:g}), reference 5 (margin {LEAD:g})"


@pytest.mark.parametrize("at", range(MOST))
def test_a_second_choice_costs_its_distance_shared_by_all_tokens(at: int) -> None:
    """The reference is asked what it would say after what was said, not after what it said."""
    tokens: list[int] = []
    for place in range(MOST):
        tokens.append((tokens or PROMPT)[-1] + (2 if place == at else 1))
    assert regret(tokens, (4, 5, 6, 7, 8, 9)) == pytest.approx(LEAD / MOST)


def test_an_end_too_early_costs_what_the_end_costs() -> None:
    """All tokens are first choices, and then it stops where the reference would go on."""
    likes = after([5])[0]
    end = likes.max() - likes[STOP]
    assert regret([4, 5], (4, 5, 6, 7)) == pytest.approx(float(end))


def test_an_end_at_the_maximum_is_no_choice() -> None:
    """The bundle said as many tokens as it may; that the reference would go on says nothing."""
    ours = [4, 5, 6, 7, 8, 9]
    assert len(ours) == MOST
    assert regret(ours, (4, 5, 6, 7, 8, 10)) == pytest.approx(0)


def test_a_text_that_goes_on_after_a_stop_token() -> None:
    assert regret([4, STOP, 3, 4], (4, 5, 6, 7)) == math.inf


def test_a_stop_token_where_the_reference_would_go_on() -> None:
    likes = after([4])[0]
    worse = (likes.max() - likes[STOP]) / 2  # of two tokens
    assert regret([4, STOP], (4, 5, 6, 7)) == pytest.approx(float(worse))


def test_what_follows_an_image_token_is_not_judged() -> None:
    """It can't be fed back, so nobody knows what the reference would say after it."""
    one = judge((4, 5, 6, 7))
    values, _ = one.tokens([4, IMAGE, 1, 1])
    fed = cast(Chain, one.reference).fed
    assert fed == (*PROMPT, 4)
    likes = after([4])[0]
    assert values["regret"] == pytest.approx(float(likes.max() - likes[IMAGE]) / 2)


def test_a_truth_that_is_cut_is_compared_as_far_as_it_goes() -> None:
    assert judge((4, 5, IMAGE), is_cut=True).tokens([4, 5, IMAGE, 1, 1])[0]["wrong"] == 0
    assert judge((4, 5, IMAGE)).tokens([4, 5, IMAGE, 1, 1])[0]["wrong"] == 2


@pytest.mark.parametrize(
    ("ours", "wrong"), [((4, 5), 2), ((4, 5, 6, 7, 8), 1), ((5, 4, 6, 7), 2), ((), 4)]
)
def test_tokens_that_one_side_lacks_are_wrong_ones(ours: tuple[int, ...], wrong: int) -> None:
    assert judging._wrong_tokens(np.array(ours, np.int64), np.array((4, 5, 6, 7))) == wrong


def test_a_text_that_is_a_part_of_the_other_has_no_first_difference() -> None:
    _, detail = judge((4, 5, 6, 7)).tokens([4, 5])
    assert detail == "2 tokens, the reference 4, equal up to there"


def test_stop_ids_are_compared_too() -> None:
    same = judge((4, 5)).stops([4, 5])
    assert same == ({"wrong": 0, "regret": 0, "stop ids": 0}, None)
    values, detail = judge((4, 5), stops=(STOP, 7)).stops([4, 5])
    assert (values["wrong"], values["stop ids"]) == (0, 1)
    assert detail == "stop ids [2, 7], the reference [2]"
    values, detail = judge((4, 5), stops=(7,)).stops([4])
    assert values["stop ids"] == 2
    assert detail is not None
    assert detail.startswith("stop ids [7], the reference [2]; 1 tokens")


def test_the_default_number_of_new_tokens_is_bounded() -> None:
    assert max_new_tokens(manifest_of(most=5)) == 5
    assert max_new_tokens(manifest_of(most=10**6)) == judging.MAX_NEW_TOKENS


# Findings


LIMITS = {"wrong": Limit(0, "tokens", "-"), "regret": Limit(0.1, "nats", "-")}


def test_a_row_is_what_was_found_beside_its_limits() -> None:
    row = row_of("red", "q8", "tokens", LIMITS, lambda: ({"wrong": 0, "regret": 0.2}, "where"))
    assert (row.image, row.precision, row.rung, row.detail) == ("red", "q8", "tokens", "where")
    assert [(one.name, one.passed) for one in row.measures] == [("wrong", True), ("regret", False)]
    assert not row.passed


def test_an_error_of_the_bundle_is_a_finding() -> None:
    def find() -> judging.Found:
        with bundle_runs():
            raise ImageError("no picture", hint="give another", code="image.unreadable")

    row = row_of("red", "q8", "tokens", LIMITS, find)
    assert row.error == "ImageError: no picture"
    assert row.measures == ()
    assert not row.passed


@pytest.mark.parametrize("error", [TypeError("a defect of ours"), KeyboardInterrupt()])
def test_a_defect_of_ours_is_none(error: BaseException) -> None:
    def find() -> judging.Found:
        with bundle_runs():
            raise error

    with pytest.raises(type(error)):
        row_of("red", "q8", "tokens", LIMITS, find)


def test_an_error_of_the_reference_is_none() -> None:
    def find() -> judging.Found:
        raise ImageError("the reference's", hint="-", code="image.unreadable")

    with raises(VlmportError, "image.unreadable", "the reference's"):
        row_of("red", "q8", "tokens", LIMITS, find)


def test_errors_that_the_bundle_raises_keep_their_cause() -> None:
    with pytest.raises(BrokenError) as caught, bundle_runs():
        raise ImageError("no picture", hint="give another", code="image.unreadable")
    assert isinstance(caught.value.__cause__, ImageError)


def test_a_failing_row_has_a_code_and_its_numbers_in_json() -> None:
    limits = {"worst": Limit(0.5, "std", ""), "top1": Limit(0.8, "", "", at_least=True)}

    def row(find: Callable[[], Any]) -> dict[str, Any]:
        return row_of("an image", "q4", "first_logits", limits, find).to_json()

    def fails(error: Exception) -> Any:
        with bundle_runs():
            raise error

    good = row(lambda: ({"worst": 0.25, "top1": 1.0}, None))
    assert good.keys() == {"image", "precision", "rung", "passed", "measures"}
    bad = row(lambda: ({"worst": 0.25, "top1": 0.5}, None))
    assert (bad["passed"], bad["code"]) == (False, PAST_LIMIT)
    assert bad["past_limit"] == {"top1": {"value": 0.5, "limit": 0.8, "at_least": True, "unit": ""}}
    assert row(lambda: ({"worst": math.inf, "top1": 1.0}, None))["past_limit"]["worst"] == {
        "value": None, "limit": 0.5, "at_least": False, "unit": "std",
    }  # fmt: skip
    refused = row(lambda: fails(ImageError("too thin", hint="crop it", code="image.refused")))
    assert (refused["code"], refused["error"]) == ("image.refused", "ImageError: too thin")
    assert "past_limit" not in refused
    assert row(lambda: fails(ORT_ERRORS[0]("no such kernel")))["code"] == GRAPH_FAILS
