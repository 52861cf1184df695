"""Choosing tokens: pure functions of the logits and of what was chosen before.

A search belongs to one request and knows nothing of graphs, caches or other requests. The caller
runs the decoder and hands in the logits; the search says which token each row goes on with, and
whose cache it continues.

A step computes a whole new state and then puts it in place: an interrupt leaves the old or the new
one, never something between.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlmport.runtime.decoding.beams import BeamSearch
from vlmport.runtime.decoding.hypotheses import (
    Choice,
    Ending,
    Hypothesis,
    IsStopped,
    Reporter,
    StopReason,
    TokenLogprob,
    check_logits,
    nothing_left,
)
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import Mask, Processors, new_processors
from vlmport.runtime.decoding.rng import State, draw, new_seed, stream

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = [
    "Choice",
    "Hypothesis",
    "IsStopped",
    "Mask",
    "Search",
    "StopReason",
    "TokenLogprob",
    "new_search",
]


class Search(Protocol):
    """The decoding of one request.

    After an interrupt `steps` and `last` tell the caller which of its calls took effect; that is
    all it needs to go on.

    Attributes:
        rows: the most rows that it ever has at once; the cache is sized by it.
        seed: of the random stream, also where none was given; None if nothing is drawn.
    """

    rows: int
    seed: int | None

    @property
    def steps(self) -> int:
        """How many choices it has made."""
        ...

    @property
    def last(self) -> Choice | None:
        """The last choice; None before the first."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing is left to choose."""
        ...

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The new tokens of each row of the last choice: what is still in progress."""
        ...

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        """One token more for each row.

        Args:
            logits: one row for each token of the last choice, in its order; the first time the
                one row after the prompt. Never written to, never kept.

        Raises DeviceError for logits that are not numbers, OptionError where the options leave no
        token to choose.
        """
        ...

    def results(self) -> list[Hypothesis]:
        """The answers, best first, finished or not; none before the first choice.

        num_return_sequences of them; fewer where beams find no more, under a grammar that few
        texts fit.
        """
        ...


def new_search(
    options: GenerationOptions,
    *,
    prompt_ids: Sequence[int],
    processors_see_prompt: bool,
    stop_token_ids: Collection[int],
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
        pad_token_id: for callers that pad; no row is padded here.
        max_new_tokens: at most so many, whatever the options say.
        vocab_size: V, the width of the logits.
        is_stopped: asked after each token that is no stop token.
        mask: applied before tokens are drawn, where HF applies prefix_allowed_tokens_fn.

    Raises OptionError for token ids outside the vocabulary, and for options that this prompt can't
    serve.
    """
    stops = frozenset(stop_token_ids)
    processors = new_processors(
        options,
        prompt_ids=prompt_ids,
        processors_see_prompt=processors_see_prompt,
        stop_token_ids=stops,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
        mask=mask,
    )
    seed = None
    if options.do_sample:
        seed = new_seed() if options.seed is None else options.seed
    ending = Ending(stops, max_new_tokens, is_stopped)
    if options.num_beams > 1:
        return BeamSearch(options, processors, ending, seed)
    return SideBySide(options, processors, ending, seed, vocab_size)


@dataclass(frozen=True)
class _Sequence:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_reason: StopReason | None = None
    stream: State | None = None


@dataclass(frozen=True)
class _Moment:
    """A state of the search.

    Attributes:
        going: the sequences of the last choice's rows, as places in `sequences`.
    """

    sequences: tuple[_Sequence, ...]
    going: tuple[int, ...]
    steps: int = 0
    last: Choice | None = None


class SideBySide:
    """Greedy decoding, or several sequences that are drawn independently of each other."""

    def __init__(
        self,
        options: GenerationOptions,
        processors: Processors,
        ending: Ending,
        seed: int | None,
        vocab_size: int,
    ):
        self.rows = options.num_return_sequences
        self.seed = seed
        self._processors, self._ending = processors, ending
        self._reporter = Reporter(options.logprobs)
        # What processors write to: a new array for each token is slow.
        self._scores = np.empty(vocab_size, np.float32)
        self._check = not options.remove_invalid_values
        streams = [None if seed is None else stream(seed, n) for n in range(self.rows)]
        self._now = _Moment(
            tuple(_Sequence(stream=one) for one in streams), tuple(range(self.rows))
        )

    @property
    def steps(self) -> int:
        return self._now.steps

    @property
    def last(self) -> Choice | None:
        return self._now.last

    @property
    def done(self) -> bool:
        return not self._now.going

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self._now.sequences[one].tokens for one in self._now.going)

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        now, tops = self._now, logits.argmax(-1).tolist()
        if self._check:
            check_logits(logits, tops, now.steps)
        sequences = list(now.sequences)
        going, tokens, parents = [], [], []
        for place, n in enumerate(now.going):
            row = place if now.steps else 0  # all continue the one row of the prompt
            sequences[n] = self._longer(sequences[n], logits[row], tops[row])
            if sequences[n].stop_reason is None:
                going.append(n)
                tokens.append(sequences[n].tokens[-1])
                parents.append(row)
        choice = Choice(tuple(tokens), tuple(parents))
        self._now = _Moment(tuple(sequences), tuple(going), now.steps + 1, choice)
        return choice

    def _longer(
        self, sequence: _Sequence, logits: Float32[np.ndarray, " V"], token: int
    ) -> _Sequence:
        """The sequence with one token more; `token` is the best by the logits alone."""
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
        return _Sequence(tokens, reported, self._ending.reason(tokens), stream)

    def results(self) -> list[Hypothesis]:
        return [
            Hypothesis(one.tokens, one.stop_reason, logprobs=self._reporter.all(one.logprobs))
            for one in self._now.sequences
            if one.tokens
        ]
