"""A job's work inside the scheduler, and how its tokens become events."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmport.runtime.decoding.search import Hypothesis
from vlmport.runtime.images.features import PromptImage
from vlmport.runtime.preparing import Decoding, PreparedRequest, Preparer
from vlmport.runtime.request import Request
from vlmport.runtime.response import Answer, AnswerText
from vlmport.runtime.scheduling.job import Finished, Job, Piece, Reason, ended_early

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int64


@dataclass
class _Sent:
    """How much of one sequence was sent.

    Attributes:
        tokens: number of tokens in its pieces.
        text: decodes its tokens; `text.given` is the text of its pieces.
    """

    text: AnswerText
    tokens: int = 0


@dataclass(eq=False)
class Task:
    """A job, and everything that it takes to run it.

    Attributes:
        text: the prompt's ids, with one placeholder for each image.
        sources: the images as they were given, each with its options; () once they are encoded.
        images: the encoded images; None before.
        rows: number of rows of the cache that the search takes.
        tokens: maximum length of a row, prompt and answer; 0 until the images are processed.
        prepared: the request; None until its prompt begins to run.
        prefill_seconds: time that the decoder spent on the prompt.
    """

    job: Job
    decoding: Decoding
    text: Int64[np.ndarray, " S"]
    sources: Sequence[tuple[Any, Mapping[str, Any]]]
    images: tuple[PromptImage, ...] | None
    rows: int
    tokens: int = 0
    image_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prepared: PreparedRequest | None = None
    _sent: list[_Sent] = field(default_factory=list)
    _tokens: int = 0

    @property
    def request(self) -> Request:
        """The request of a task whose prompt began to run."""
        assert self.prepared is not None, "not started yet"
        return self.prepared.request

    def advance(self, preparer: Preparer) -> int:
        """Emit what the last choice has made certain, and return the number of new tokens."""
        times, now = self.job.times, time.monotonic()
        times.last_token = now
        times.first_token = times.first_token or now
        found = self.request.search.results()
        before, self._tokens = self._tokens, sum(len(one.tokens) for one in found)
        if self.decoding.options.num_beams > 1:  # the best is known at the end
            return self.rows
        for n, one in enumerate(found):
            sent = self._of(n, preparer)
            if sent.tokens == len(one.tokens):  # it ended before
                continue
            text = sent.text.push(one.tokens, one.stop_reason)
            if text or one.stop_reason:
                self._emit(n, text, one, now)
        return self._tokens - before

    def finish(self, preparer: Preparer, reason: Reason) -> None:
        """Emit the rest of the answer, and the last event."""
        response = None
        if self.prepared is not None and self.prepared.request.search.steps:
            since = time.monotonic() - (self.job.times.first_token or time.monotonic())
            seconds = {"prefill": self.prefill_seconds, "decode": since}
            response = preparer.response(self.prepared, seconds)
            for n, answer in enumerate((response, *response.alternatives)):
                sent = self._of(n, preparer)
                # Beams are sent at the end. An early end leaves text that was held back: what may
                # have become a stop string, and half of a character.
                rest = answer.text[len(sent.text.given) :]
                if rest or sent.tokens < len(answer.token_ids):
                    self._emit(n, rest, answer, time.monotonic())
        if reason == "finished":
            self.job.emit(Finished(reason, response))
        else:
            self.job.emit(ended_early(reason, response))

    def fail(self, error: Exception) -> None:
        """Emit the last event of a job that an error ended."""
        self.job.emit(Finished("failed", None, error))

    def _of(self, n: int, preparer: Preparer) -> _Sent:
        while len(self._sent) <= n:
            self._sent.append(_Sent(preparer.answer_text(self.decoding)))
        return self._sent[n]

    def _emit(self, n: int, text: str, found: Hypothesis | Answer, at: float) -> None:
        """Emit a piece with all tokens that were not sent yet."""
        tokens = found.tokens if isinstance(found, Hypothesis) else found.token_ids
        sent, self._sent[n].tokens = self._sent[n].tokens, len(tokens)
        reports = None if found.logprobs is None else found.logprobs[sent:]
        self.job.emit(Piece(n, text, tokens[sent:], reports, found.stop_reason, at))
