"""Greedy decoding and sampling, and what every search has in common.

A search chooses the tokens of one request. It is a pure function of the logits and of its earlier
choices: it knows nothing of graphs, caches or other requests. The caller runs the decoder and
passes the logits in; the search says which token each row continues with, and which row of the
cache it continues.

A step computes a whole new state and then stores it in one assignment: an interrupt leaves the old
state or the new one, never something in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from vlmport.errors import DeviceError, OptionError
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import Processors
from vlmport.runtime.decoding.rng import State, draw, stream
from vlmport.runtime.decoding.score_rows import best

if TYPE_CHECKING:
    from jaxtyping import Float32

StopReason = Literal["stop", "length", "stop_string"]
IsStopped = Callable[[Sequence[int]], bool]
"""Whether a row's new tokens contain a stop string, asked after each token. A pure function: beams
ask about continuations that they drop afterwards."""


@dataclass(frozen=True)
class Choice:
    """The tokens to run next.

    Attributes:
        tokens: the next token of each row that goes on; finished rows are left out.
        parents: for each token, the row of the last call (0 after the prompt) that it continues.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability by the raw logits, and the most likely tokens at its place.

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
        stop_reason: None if the answer could go on, because the search was interrupted.
        score: for beam search, the sum of the log-probabilities over length ** length_penalty.
        logprobs: one for each token if options.logprobs is given, else None.
    """

    tokens: tuple[int, ...]
    stop_reason: StopReason | None
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


class Search(Protocol):
    """The decoding of one request.

    After an interrupt `steps` and `last` tell the caller which of its calls took effect; it needs
    nothing else to go on.

    Attributes:
        rows: the maximum number of rows; the cache is sized by it.
        seed: the seed of the random stream, even if none was given; None without sampling.
    """

    rows: int
    seed: int | None

    @property
    def steps(self) -> int:
        """The number of choices so far."""
        ...

    @property
    def last(self) -> Choice | None:
        """The last choice; None before the first."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing is left to choose."""
        ...

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        """Choose one more token for each row.

        Args:
            logits: one row for each token of the last choice, in its order; the first time, one
                row for the prompt. They are never written to and never kept.

        Raises DeviceError for logits that are not finite, OptionError where the options leave no
        token to choose.
        """
        ...

    def results(self) -> list[Hypothesis]:
        """Return the answers, best first, finished or not; none before the first choice.

        There are num_return_sequences answers, or fewer where beam search finds no more, under a
        grammar that few texts match.
        """
        ...


@dataclass(frozen=True)
class StopCondition:
    """Decides when an answer ends."""

    stop_token_ids: frozenset[int]
    max_new_tokens: int
    is_stopped: IsStopped | None = None

    def reason(self, tokens: tuple[int, ...]) -> StopReason | None:
        """Return why an answer ends with the last of these tokens; None if it goes on."""
        if tokens and tokens[-1] in self.stop_token_ids:
            return "stop"
        if tokens and self.is_stopped and self.is_stopped(tokens):
            return "stop_string"
        return "length" if len(tokens) >= self.max_new_tokens else None


@dataclass(frozen=True)
class LogprobReporter:
    """Reports log-probabilities, if `count` (options.logprobs) asks for them."""

    count: int | None

    def all(self, reported: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...] | None:
        """Return the reports of an answer; None if there are none."""
        return None if self.count is None else reported

    def report(
        self, logits: Float32[np.ndarray, " V"], tokens: Sequence[int]
    ) -> list[TokenLogprob]:
        """Report the log-probability of each of these tokens by one row of raw logits."""
        if self.count is None:
            return []
        apart = logits.astype(np.float64) - float(logits.max())
        total = float(np.log(np.exp(apart).sum()))
        ids = best(logits, min(self.count, len(logits))).tolist() if self.count else []
        top = tuple((one, float(np.float32(apart[one] - total))) for one in ids)
        return [TokenLogprob(one, float(np.float32(apart[one] - total)), top) for one in tokens]


def check_logits(logits: Float32[np.ndarray, "n V"], tops: Sequence[int], place: int) -> None:
    """Raise DeviceError for rows whose best logit is not finite: the decoder is at fault.

    Args:
        tops: the best token of each row, by `argmax`; NaN is the best of its row.
        place: the number of tokens before this one, for the message.
    """
    if not all(math.isfinite(logits[row, top]) for row, top in enumerate(tops)):
        raise DeviceError(
            f"the decoder's scores are not finite at token {place}",
            hint="run `vlmport inspect --probe` to test this device, or try another precision",
            code="device.not-finite",
        )


def nothing_left(place: int) -> OptionError:
    """Make the error for scores that leave no token to choose."""
    return OptionError(
        f"the options leave no token to choose at token {place}",
        hint="leave out one of the options that forbid tokens (bad words, suppress_tokens, "
        "no_repeat_ngram_size, min_new_tokens, a grammar)",
        code="option.no-token-left",
    )


@dataclass(frozen=True)
class _Sequence:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_reason: StopReason | None = None
    stream: State | None = None


@dataclass(frozen=True)
class _SequencesState:
    """The state between two steps.

    Attributes:
        going: indices into `sequences` of the rows of the last choice.
    """

    sequences: tuple[_Sequence, ...]
    going: tuple[int, ...]
    steps: int = 0
    last: Choice | None = None


class IndependentSearch:
    """Greedy decoding, or several sequences that are sampled independently of each other."""

    def __init__(
        self,
        options: GenerationOptions,
        processors: Processors,
        stop_condition: StopCondition,
        seed: int | None,
        vocab_size: int,
    ):
        self.rows = options.num_return_sequences
        self.seed = seed
        self._processors, self._stop_condition = processors, stop_condition
        self._reporter = LogprobReporter(options.logprobs)
        # The buffer that processors write to: a new array for each token is slow.
        self._scores = np.empty(vocab_size, np.float32)
        self._check = not options.remove_invalid_values
        streams = [None if seed is None else stream(seed, n) for n in range(self.rows)]
        self._state = _SequencesState(
            tuple(_Sequence(stream=one) for one in streams), tuple(range(self.rows))
        )

    @property
    def steps(self) -> int:
        return self._state.steps

    @property
    def last(self) -> Choice | None:
        return self._state.last

    @property
    def done(self) -> bool:
        return not self._state.going

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        state, tops = self._state, logits.argmax(-1).tolist()
        if self._check:
            check_logits(logits, tops, state.steps)
        sequences = list(state.sequences)
        going, tokens, parents = [], [], []
        for place, n in enumerate(state.going):
            row = place if state.steps else 0  # all continue the one row of the prompt
            sequences[n] = self._extended(sequences[n], logits[row], tops[row])
            if sequences[n].stop_reason is None:
                going.append(n)
                tokens.append(sequences[n].tokens[-1])
                parents.append(row)
        choice = Choice(tuple(tokens), tuple(parents))
        self._state = _SequencesState(tuple(sequences), tuple(going), state.steps + 1, choice)
        return choice

    def _extended(
        self, sequence: _Sequence, logits: Float32[np.ndarray, " V"], token: int
    ) -> _Sequence:
        """Return the sequence with one more token; `token` is the best by the logits alone."""
        scores, stream = logits, sequence.stream
        if self._processors.in_order:
            np.copyto(self._scores, logits)
            scores = self._processors(self._scores, sequence.tokens)
            token = int(scores.argmax())
            if not math.isfinite(scores[token]):
                raise nothing_left(len(sequence.tokens))
        if stream is not None:
            token, stream = draw(scores, stream)
        tokens = (*sequence.tokens, token)
        reported = (*sequence.logprobs, *self._reporter.report(logits, [token]))
        return _Sequence(tokens, reported, self._stop_condition.reason(tokens), stream)

    def results(self) -> list[Hypothesis]:
        return [
            Hypothesis(one.tokens, one.stop_reason, logprobs=self._reporter.all(one.logprobs))
            for one in self._state.sequences
            if one.tokens
        ]
