"""Beam search and beam sampling.

Step by step as Hugging Face's does it, with its numbers: all scores are float32, and a penalty of
1e9 stands for "not among these", so that even what it gives where few tokens are allowed is equal.
Candidates with equal scores come in the order of their beams, then of their ids.

Source: transformers 5.23, generation/utils.py `_beam_search`, one request at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.decoding.hypotheses import (
    Choice,
    Ending,
    Hypothesis,
    Reporter,
    StopReason,
    TokenLogprob,
    check_logits,
    nothing_left,
)
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import Processors
from vlmport.runtime.decoding.rng import State, draw_several, stream
from vlmport.runtime.decoding.score_rows import best, log_softmax

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

NOT_AMONG_THESE = np.float32(-1e9)
LEAST = np.float32(-1e30)  # no sum is so low unless it holds a token that is forbidden


@dataclass(frozen=True)
class _Beam:
    """A sequence in progress, or a finished one.

    Attributes:
        score: in progress the sum of its log-probabilities; finished, that sum over its length to
            the power of length_penalty.
        idle: whether it never counted: it is there to fill the rows up.
        row: of the last call, whose cache it continues.
    """

    tokens: tuple[int, ...] = ()
    score: np.float32 = NOT_AMONG_THESE
    idle: bool = True
    row: int = 0
    stop_reason: StopReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class _Moment:
    """A state of the search: the beams in progress and the best finished ones, best first."""

    running: tuple[_Beam, ...]
    finished: tuple[_Beam, ...]
    stream: State | None
    steps: int = 0
    done: bool = False
    last: Choice | None = None


class BeamSearch:
    """Follow num_beams sequences at once."""

    def __init__(
        self, options: GenerationOptions, processors: Processors, ending: Ending, seed: int | None
    ):
        self.rows = options.num_beams
        self.seed = seed
        self._options, self._processors, self._ending = options, processors, ending
        self._reporter = Reporter(options.logprobs)
        self._candidates = max(2, 1 + len(ending.stop_token_ids)) * self.rows
        nothing = _Beam()
        self._now = _Moment(
            # Only the first counts: all start as the same row.
            running=(_Beam(score=np.float32(0), idle=False), *[nothing] * (self.rows - 1)),
            finished=(nothing,) * self.rows,
            stream=None if seed is None else stream(seed, 0),
        )

    @property
    def steps(self) -> int:
        return self._now.steps

    @property
    def last(self) -> Choice | None:
        return self._now.last

    @property
    def done(self) -> bool:
        return self._now.done

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return () if self.done else tuple(beam.tokens for beam in self._now.running)

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        now = self._now
        if not self._options.remove_invalid_values:
            check_logits(logits, logits.argmax(-1).tolist(), now.steps)
        totals = self._totals(logits)
        if not totals.max() > -np.inf:
            return self._exhausted()
        candidates, state = self._continuations(logits, totals)
        ended = np.array([beam.stop_reason is not None for beam in candidates])
        running = self._next_running(candidates, ended)
        finished = self._best_finished(candidates, ended)
        done = bool(ended.all()) or not self._may_improve(running, finished)
        choice = Choice((), ())
        if not done:
            tokens = tuple(beam.tokens[-1] for beam in running)
            choice = Choice(tokens, tuple(beam.row for beam in running))
        self._now = _Moment(running, finished, state, now.steps + 1, done, choice)
        return choice

    def _exhausted(self) -> Choice:
        """No beam can go on, under a grammar for example that allows few texts: the finished ones
        are the answers. Raises OptionError where there is none."""
        if not any(beam.stop_reason for beam in self._now.finished):
            raise nothing_left(self._now.steps)
        choice = Choice((), ())
        self._now = replace(self._now, steps=self._now.steps + 1, done=True, last=choice)
        return choice

    def _continuations(
        self, logits: Float32[np.ndarray, "n V"], totals: Float32[np.ndarray, " beams*V"]
    ) -> tuple[list[_Beam], State | None]:
        """The best continuations of all beams, or as many drawn; and the random stream after."""
        now = self._now
        count, state = min(self._candidates, len(totals)), now.stream
        if state is None:
            chosen = best(totals, count).tolist()
        else:
            chosen, state = draw_several(totals, count, state)
        V = logits.shape[-1]
        beams = [self._longer(now.running[at // V], at % V, totals[at], at // V) for at in chosen]
        return self._reported(beams, logits), state

    def _totals(self, logits: Float32[np.ndarray, "n V"]) -> Float32[np.ndarray, " beams*V"]:
        """The score of each beam with each token after it, beam by beam."""
        now = self._now
        log_probs = log_softmax(logits)  # an array of our own, which processors may write to
        rows = [
            self._processors(row, beam.tokens)
            for row, beam in zip(log_probs, now.running, strict=False)  # at first one row for all
        ]
        rows += rows[:1] * (len(now.running) - len(rows))
        with np.errstate(over="ignore"):
            totals = [row + beam.score for row, beam in zip(rows, now.running, strict=True)]
        return np.concatenate(totals)

    def _longer(self, beam: _Beam, token: int, score: np.float32, row: int) -> _Beam:
        """A beam with one token more."""
        tokens = (*beam.tokens, token)
        return _Beam(
            tokens,
            score,
            idle=beam.idle or not score > LEAST,
            row=row if self._now.steps else 0,
            stop_reason=self._ending.reason(tokens),
            logprobs=beam.logprobs,
        )

    def _reported(self, beams: list[_Beam], logits: Float32[np.ndarray, "n V"]) -> list[_Beam]:
        """The beams with the log-probability of their last token, if these are asked for."""
        if self._options.logprobs is None:
            return beams
        found: dict[int, list[int]] = {}
        for at, beam in enumerate(beams):
            found.setdefault(beam.row, []).append(at)
        for row, places in found.items():
            reports = self._reporter.report(logits[row], [beams[at].tokens[-1] for at in places])
            for at, report in zip(places, reports, strict=True):
                beams[at] = replace(beams[at], logprobs=(*beams[at].logprobs, report))
        return beams

    def _next_running(
        self, candidates: list[_Beam], ended: Bool[np.ndarray, " C"]
    ) -> tuple[_Beam, ...]:
        """The best that did not end, best first."""
        scores = np.array([beam.score for beam in candidates], np.float32)
        scores = scores + ended.astype(np.float32) * NOT_AMONG_THESE
        chosen = best(scores, self.rows).tolist()
        return tuple(
            replace(candidates[at], score=scores[at], idle=candidates[at].idle or bool(ended[at]))
            for at in chosen
        )

    def _best_finished(
        self, candidates: list[_Beam], ended: Bool[np.ndarray, " C"]
    ) -> tuple[_Beam, ...]:
        """The best finished ones, with those new that end among the best candidates."""
        length = np.float32(len(candidates[0].tokens) ** self._options.length_penalty)
        merged = list(self._now.finished)
        for place, (beam, has_ended) in enumerate(zip(candidates, ended.tolist(), strict=True)):
            score, counts = beam.score / length, has_ended and place < self.rows
            if not counts:
                beam, score = replace(beam, stop_reason=None), score + NOT_AMONG_THESE
            merged.append(replace(beam, score=score))
        scores = np.array([beam.score for beam in merged], np.float32)
        return tuple(merged[at] for at in best(scores, self.rows).tolist())

    def _may_improve(self, running: tuple[_Beam, ...], finished: tuple[_Beam, ...]) -> bool:
        """Whether the best beam in progress could still become one of the best."""
        o = self._options
        full = all(beam.stop_reason for beam in finished)
        if full and o.early_stopping is True:
            return False
        length = len(running[0].tokens)
        if o.early_stopping == "never" and o.length_penalty > 0:
            length = self._ending.max_new_tokens
        hope = running[0].score / np.float32(length**o.length_penalty)
        worst = min(beam.score for beam in finished)
        return any(hope > (worst if beam.stop_reason else NOT_AMONG_THESE) for beam in finished)

    def results(self) -> list[Hypothesis]:
        now, most = self._now, self._options.num_return_sequences
        if not now.steps:
            return []
        found = [beam for beam in now.finished if beam.stop_reason]
        if not now.done or not found:
            length = np.float32(now.steps**self._options.length_penalty)
            found += [replace(beam, score=beam.score / length) for beam in now.running]
            found.sort(key=lambda beam: -beam.score)
        real = [beam for beam in found if not beam.idle]
        return [
            Hypothesis(
                beam.tokens, beam.stop_reason, float(beam.score), self._reporter.all(beam.logprobs)
            )
            for beam in (real or found)[:most]
        ]
