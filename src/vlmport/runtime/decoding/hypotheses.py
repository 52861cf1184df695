"""What a search says: which tokens come next, and which answers there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlmport.errors import DeviceError, OptionError
from vlmport.runtime.decoding.score_rows import best

if TYPE_CHECKING:
    from jaxtyping import Float32

StopReason = Literal["stop", "length", "stop_string"]
IsStopped = Callable[[Sequence[int]], bool]
"""Whether a row's new tokens hold a stop string, asked after each token. A pure function: beams
ask about continuations that they then drop."""


@dataclass(frozen=True)
class Choice:
    """What to run next.

    Attributes:
        tokens: the next token of each row that goes on; rows that are finished are left out.
        parents: for each, the row of the last call (0 after the prompt) whose cache it continues.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability by the raw logits, and the most probable tokens there.

    Attributes:
        top: (token, log-probability), best first; as many as options.logprobs asks for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Hypothesis:
    """One answer.

    Attributes:
        tokens: the new tokens, the stop token included.
        stop_reason: None while it could go on: the search was interrupted.
        score: beam search's: the sum of the log-probabilities over length ** length_penalty.
        logprobs: one for each token if options.logprobs is given, else None.
    """

    tokens: tuple[int, ...]
    stop_reason: StopReason | None
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Ending:
    """When an answer ends."""

    stop_token_ids: frozenset[int]
    max_new_tokens: int
    is_stopped: IsStopped | None = None

    def reason(self, tokens: tuple[int, ...]) -> StopReason | None:
        """Why an answer ends with the last of these tokens; None if it goes on."""
        if tokens and tokens[-1] in self.stop_token_ids:
            return "stop"
        if tokens and self.is_stopped and self.is_stopped(tokens):
            return "stop_string"
        return "length" if len(tokens) >= self.max_new_tokens else None


@dataclass(frozen=True)
class Reporter:
    """Reports log-probabilities, if they are asked for."""

    count: int | None

    def all(self, reported: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...] | None:
        """What was reported of an answer; None if nothing is."""
        return None if self.count is None else reported

    def report(
        self, logits: Float32[np.ndarray, " V"], tokens: Sequence[int]
    ) -> list[TokenLogprob]:
        """The log-probability of each of these tokens by one row of raw logits, V of them."""
        if self.count is None:
            return []
        apart = logits.astype(np.float64) - float(logits.max())
        total = float(np.log(np.exp(apart).sum()))
        ids = best(logits, min(self.count, len(logits))).tolist() if self.count else []
        top = tuple((one, float(np.float32(apart[one] - total))) for one in ids)
        return [TokenLogprob(one, float(np.float32(apart[one] - total)), top) for one in tokens]


def check_logits(logits: Float32[np.ndarray, "n V"], tops: Sequence[int], place: int) -> None:
    """Raise DeviceError for rows whose best logit is no number: a broken decoder, not an option.

    Args:
        tops: the best token of each row, by `argmax`: NaN is the best of its row.
        place: how many tokens stand before, for the message.
    """
    if not all(math.isfinite(logits[row, top]) for row, top in enumerate(tops)):
        raise DeviceError(
            f"the decoder's scores are not finite at token {place}",
            hint="`vlmport inspect --probe` tries this device; another precision may work",
            code="device.not-finite",
        )


def nothing_left(place: int) -> OptionError:
    """The error for scores among which no token can be chosen."""
    return OptionError(
        f"the options leave no token to choose at token {place}",
        hint="of those that forbid tokens (bad words, suppress_tokens, no_repeat_ngram_size, "
        "min_new_tokens, a grammar) leave one out",
        code="option.no-token-left",
    )
