"""Choosing tokens: pure functions of the logits and of what was chosen before.

A search belongs to one request and knows nothing of graphs, caches or other requests. The caller
runs the decoder and hands in the logits; the search says which token each row goes on with, and
whose cache it continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from vlmport.errors import DeviceError
from vlmport.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

StopReason = Literal["stop", "length", "stop_string"]
IsStopped = Callable[[Sequence[int]], bool]
"""Whether a row's new tokens, the last included, hold a stop string. A pure function: beams that
are dropped later are asked about too."""
Mask = Callable[[Sequence[int]], "Bool[np.ndarray, ' V']"]
"""Which tokens may follow a row's new tokens. A pure function of them, so that beams may ask it in
any order; it may keep what it computed for a beginning."""


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


class Search(Protocol):
    """The decoding of one request.

    A choice happens as a whole or not at all: after an interrupt `last` and `steps` tell the caller
    which of its calls took effect, and `results` holds what there is.

    Attributes:
        rows: the most rows that it ever has at once; the cache is sized by it.
        steps: how many choices it has made.
        last: the last of them, None before the first.
        seed: of the random stream, also where none was given; None if nothing is drawn.
    """

    rows: int
    steps: int
    last: Choice | None
    seed: int | None

    @property
    def done(self) -> bool:
        """Whether nothing is left to choose."""
        ...

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        """One token more for each row.

        Args:
            logits: one row for each token of the last choice, in its order; the first time the
                one row after the prompt. Never written to.

        Raises DeviceError for logits that are not numbers, OptionError where the options leave no
        token to choose.
        """
        ...

    def results(self) -> list[Hypothesis]:
        """Best first; num_return_sequences of them, fewer only before the first choice."""
        ...


def new_search(
    options: GenerationOptions,
    *,
    prompt_ids: Sequence[int],
    processors_see_prompt: bool,
    stop_token_ids: Sequence[int] | frozenset[int],
    pad_token_id: int,
    max_new_tokens: int,
    vocab_size: int,
    is_stopped: IsStopped | None = None,
    mask: Mask | None = None,
) -> Search:
    """The search that the options ask for: greedy, sampling, beam search or beam sampling.

    Args:
        prompt_ids: the whole prompt, image tokens included.
        processors_see_prompt: whether penalties look at the prompt too, or at new tokens only.
        pad_token_id: kept for callers that pad; rows here are never padded.
        max_new_tokens: at most; min(the options', what the context allows).
        vocab_size: V.

    Raises OptionError for token ids outside the vocabulary and for options that this prompt can't
    serve.
    """
    return Greedy(options, frozenset(stop_token_ids), max_new_tokens, is_stopped)


class Greedy:
    """The best token of each step."""

    rows = 1
    seed = None

    def __init__(
        self,
        options: GenerationOptions,
        stop_token_ids: frozenset[int],
        max_new_tokens: int,
        is_stopped: IsStopped | None,
    ):
        self._stops, self._most, self._is_stopped = stop_token_ids, max_new_tokens, is_stopped
        self._least = options.min_new_tokens
        self.tokens: tuple[int, ...] = ()
        self.last: Choice | None = None

    @property
    def steps(self) -> int:
        return len(self.tokens)

    @property
    def done(self) -> bool:
        return self._stop_reason() is not None

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        scores = logits[0]
        if len(self.tokens) < self._least:
            scores = scores.copy()
            scores[[token for token in self._stops if token < len(scores)]] = -np.inf
        token = int(scores.argmax())
        if not np.isfinite(scores[token]):
            raise DeviceError(
                f"the decoder's scores are not finite at token {len(self.tokens)}",
                hint="`vlmport inspect --probe` tries this device; another precision may work",
            )
        self.tokens = (*self.tokens, token)
        self.last = Choice((), ()) if self.done else Choice((token,), (0,))
        return self.last

    def results(self) -> list[Hypothesis]:
        return [Hypothesis(self.tokens, self._stop_reason())] if self.tokens else []

    def _stop_reason(self) -> StopReason | None:
        if self.tokens and self.tokens[-1] in self._stops:
            return "stop"
        if self._is_stopped and self.tokens and self._is_stopped(self.tokens):
            return "stop_string"
        return "length" if len(self.tokens) >= self._most else None
