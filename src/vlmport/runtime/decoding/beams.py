"""Beam search and beam sampling.

Each step computes what Hugging Face's beam search does, with its numbers: all scores are float32,
and a penalty of 1e9 marks a candidate as excluded. So the results are equal even where few tokens
are allowed. Candidates with equal scores come in the order of their beams, then of their ids.

Source: transformers 5.23, generation/utils.py `_beam_search`, one request at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import Processors
from vlmport.runtime.decoding.rng import State, draw_several
from vlmport.runtime.decoding.rng import stream as random_stream
from vlmport.runtime.decoding.score_rows import best, log_softmax
from vlmport.runtime.decoding.search import (
    Choice,
    Hypothesis,
    LogprobReporter,
    StopCondition,
    StopReason,
    TokenLogprob,
    check_logits,
    nothing_left,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

EXCLUDED = np.float32(-1e9)
LEAST = np.float32(-1e30)  # a lower sum contains a forbidden token


@dataclass(frozen=True)
class _Beam:
    """A sequence in progress, or a finished one.

    Attributes:
        score: the sum of its log-probabilities while in progress; when finished, that sum over
            its length to the power of length_penalty.
        filler: whether it only fills up the rows and is never an answer.
        row: the row of the last call that it continues.
    """

    tokens: tuple[int, ...] = ()
    score: np.float32 = EXCLUDED
    filler: bool = True
    row: int = 0
    stop_reason: StopReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class _BeamsState:
    """The state between two steps: the beams in progress and the best finished ones, best first."""

    running: tuple[_Beam, ...]
    finished: tuple[_Beam, ...]
    stream: State | None
    steps: int = 0
    done: bool = False
    last: Choice | None = None


class BeamSearch:
    """Beam search over num_beams sequences, or beam sampling with a seed."""

    def __init__(
        self,
        options: GenerationOptions,
        processors: Processors,
        stop_condition: StopCondition,
        seed: int | None,
    ):
        self.rows = options.num_beams
        self.seed = seed
        self._options, self._processors, self._stop_condition = (
            options,
            processors,
            stop_condition,
        )
        self._reporter = LogprobReporter(options.logprobs)
        self._candidates = max(2, 1 + len(stop_condition.stop_token_ids)) * self.rows
        nothing = _Beam()
        self._state = _BeamsState(
            # Only the first counts: all start as the same row.
            running=(_Beam(score=np.float32(0), filler=False), *[nothing] * (self.rows - 1)),
            finished=(nothing,) * self.rows,
            stream=None if seed is None else random_stream(seed, 0),
        )

    @property
    def steps(self) -> int:
        return self._state.steps

    @property
    def last(self) -> Choice | None:
        return self._state.last

    @property
    def done(self) -> bool:
        return self._state.done

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> Choice:
        before = self._state
        if not self._options.remove_invalid_values:
            check_logits(logits, logits.argmax(-1).tolist(), before.steps)
        totals = self._totals(logits)
        if not totals.max() > -np.inf:
            return self._exhausted()
        candidates, stream = self._continuations(logits, totals)
        ended = np.array([beam.stop_reason is not None for beam in candidates])
        running = self._next_running(candidates, ended)
        finished = self._best_finished(candidates, ended)
        done = bool(ended.all()) or not self._may_improve(running, finished)
        choice = Choice((), ())
        if not done:
            tokens = tuple(beam.tokens[-1] for beam in running)
            choice = Choice(tokens, tuple(beam.row for beam in running))
        self._state = _BeamsState(running, finished, stream, before.steps + 1, done, choice)
        return choice

    def _exhausted(self) -> Choice:
        """End the search when no beam can go on, under a grammar that allows few texts for example.

        Raises OptionError where no beam has finished.
        """
        if not any(beam.stop_reason for beam in self._state.finished):
            raise nothing_left(self._state.steps)
        choice = Choice((), ())
        self._state = replace(self._state, steps=self._state.steps + 1, done=True, last=choice)
        return choice

    def _continuations(
        self, logits: Float32[np.ndarray, "n V"], totals: Float32[np.ndarray, " beams*V"]
    ) -> tuple[list[_Beam], State | None]:
        """Return the best or sampled continuations of all beams, and the random stream after."""
        before = self._state
        count, stream = min(self._candidates, len(totals)), before.stream
        if stream is None:
            chosen = best(totals, count).tolist()
        else:
            chosen, stream = draw_several(totals, count, stream)
        V = logits.shape[-1]
        beams = [
            self._extended(before.running[at // V], at % V, totals[at], at // V) for at in chosen
        ]
        return self._reported(beams, logits), stream

    def _totals(self, logits: Float32[np.ndarray, "n V"]) -> Float32[np.ndarray, " beams*V"]:
        """Compute the score of each beam with each next token, beam by beam."""
        before = self._state
        # The first time there is one row for all beams.
        log_probs = log_softmax(logits)  # a new array, which processors may write to
        rows = [
            self._processors(row, beam.tokens)
            for row, beam in zip(log_probs, before.running, strict=False)
        ]
        rows += rows[:1] * (len(before.running) - len(rows))
        with np.errstate(over="ignore"):
            totals = [row + beam.score for row, beam in zip(rows, before.running, strict=True)]
        return np.concatenate(totals)

    def _extended(self, beam: _Beam, token: int, score: np.float32, row: int) -> _Beam:
        """Return a beam with one more token."""
        tokens = (*beam.tokens, token)
        return _Beam(
            tokens,
            score,
            filler=beam.filler or not score > LEAST,
            row=row if self._state.steps else 0,
            stop_reason=self._stop_condition.reason(tokens),
            logprobs=beam.logprobs,
        )

    def _reported(self, beams: list[_Beam], logits: Float32[np.ndarray, "n V"]) -> list[_Beam]:
        """Add the log-probability of each beam's last token, if the options ask for it."""
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
        """Return the best candidates that did not end, best first."""
        scores = np.array([beam.score for beam in candidates], np.float32)
        scores = scores + ended.astype(np.float32) * EXCLUDED
        chosen = best(scores, self.rows).tolist()
        return tuple(
            replace(
                candidates[at], score=scores[at], filler=candidates[at].filler or bool(ended[at])
            )
            for at in chosen
        )

    def _best_finished(
        self, candidates: list[_Beam], ended: Bool[np.ndarray, " C"]
    ) -> tuple[_Beam, ...]:
        """Return the best finished beams, with those that ended now among the best candidates."""
        length = np.float32(len(candidates[0].tokens) ** self._options.length_penalty)
        merged = list(self._state.finished)
        for place, (beam, has_ended) in enumerate(zip(candidates, ended.tolist(), strict=True)):
            score, counts = beam.score / length, has_ended and place < self.rows
            if not counts:
                beam, score = replace(beam, stop_reason=None), score + EXCLUDED
            merged.append(replace(beam, score=score))
        scores = np.array([beam.score for beam in merged], np.float32)
        return tuple(merged[at] for at in best(scores, self.rows).tolist())

    def _may_improve(self, running: tuple[_Beam, ...], finished: tuple[_Beam, ...]) -> bool:
        """Whether the best beam in progress could still become one of the best answers."""
        o = self._options
        full = all(beam.stop_reason for beam in finished)
        if full and o.early_stopping is True:
            return False
        length = len(running[0].tokens)
        if o.early_stopping == "never" and o.length_penalty > 0:
            length = self._stop_condition.max_new_tokens
        hope = running[0].score / np.float32(length**o.length_penalty)
        worst = min(beam.score for beam in finished)
        return any(hope > (worst if beam.stop_reason else EXCLUDED) for beam in finished)

    def results(self) -> list[Hypothesis]:
        state, limit = self._state, self._options.num_return_sequences
        if not state.steps:
            return []
        found = [beam for beam in state.finished if beam.stop_reason]
        if not state.done or not found:
            length = np.float32(state.steps**self._options.length_penalty)
            found += [replace(beam, score=beam.score / length) for beam in state.running]
            found.sort(key=lambda beam: -beam.score)
        real = [beam for beam in found if not beam.filler]
        return [
            Hypothesis(
                beam.tokens, beam.stop_reason, float(beam.score), self._reporter.all(beam.logprobs)
            )
            for beam in (real or found)[:limit]
        ]
