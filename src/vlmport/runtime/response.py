"""Answers: text, token ids and scores, all at once or piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from vlmport.errors import quoted
from vlmport.runtime.decoding.search import Hypothesis, StopReason, TokenLogprob
from vlmport.runtime.streamed_text import StopStrings, TextStream


@dataclass(frozen=True, repr=False)
class Answer:
    """One generated text; `str()` gives it.

    Attributes:
        text: the text before a stop string, without special tokens unless they were asked for.
        token_ids: the tokens as generated; the stop token and the tokens of a stop string are
            among them.
        stop_reason: 'stop' for a stop token, 'stop_string', or 'length' for max_new_tokens or a
            full context; None for a beam that had not ended when the search did.
        complete: False where max_new_tokens or a full context cut the answer. An answer under a
            grammar that could end where it was cut is complete.
        score: the score of beam search; None without beams.
        logprobs: one entry for each token, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason | None
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    complete: bool = False

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        facts = [f"stop_reason={self.stop_reason!r}", f"tokens={len(self.token_ids)}"]
        if self.score is not None:
            facts.append(f"score={self.score:.4f}")
        return f"{type(self).__name__}({', '.join([quoted(self.text), *facts, *self._facts()])})"

    def _facts(self) -> list[str]:
        """List what a subclass adds to its repr."""
        return []


@dataclass(frozen=True, kw_only=True, repr=False)
class Response(Answer):
    """The best answer, and what it cost.

    Attributes:
        timings: seconds in 'image' (reading and encoding), 'prefill' and 'decode'. The images of
            one batch share the last two.
        counts: numbers of tokens: 'prompt_tokens', of which 'image_tokens' and 'cached_tokens' (not
            prefilled again in a conversation); and 'new_tokens'.
        seed: the random seed of sampling, also where none was given; None without sampling.
        alternatives: the other answers of num_return_sequences, best first.
    """

    timings: Mapping[str, float]
    counts: Mapping[str, int]
    seed: int | None = None
    alternatives: tuple[Answer, ...] = ()

    def _facts(self) -> list[str]:
        facts = [f"seconds={sum(self.timings.values()):.2f}"]
        if self.seed is not None:
            facts.append(f"seed={self.seed}")
        if self.alternatives:
            facts.append(f"alternatives={len(self.alternatives)}")
        return facts


Caption = Response  # the name of the class before answers to questions had it too


class AnswerText:
    """Decodes the tokens of an answer, all at once or as they come.

    Attributes:
        given: the text of all pieces so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: StopStrings | None = None,
        *,
        skip_special_tokens: bool = True,
    ):
        self.tokenizer, self.stops, self.skip = tokenizer, stops, skip_special_tokens
        self.given = ""
        self._certain = ""
        self._stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)

    def push(self, tokens: Sequence[int], stop_reason: StopReason | None) -> str:
        """Return the next piece that is certain, maybe ''; the whole rest once the answer stopped.

        Args:
            tokens: all tokens so far, the stop token included.
        """
        shown = self._shown(tokens, stop_reason)
        for token in shown[len(self._stream.tokens) :]:
            self._certain += self._stream.push(token)
        if stop_reason:
            self._certain += self._stream.finish()
        end = len(self._certain)
        if self.stops is not None and stop_reason in (None, "stop_string"):
            held = self.stops.held(shown, ended=stop_reason == "stop_string")
            end = min(end, end + len(self._stream.pending) - held)
        piece = self._certain[len(self.given) : end]
        self.given += piece
        return piece

    def whole(self, hypothesis: Hypothesis) -> Answer:
        """Return a whole answer."""
        tokens, reason = hypothesis.tokens, hypothesis.stop_reason
        text = self._text(self._shown(tokens, reason), reason)
        complete = reason in ("stop", "stop_string")
        return Answer(text, tokens, reason, hypothesis.score, hypothesis.logprobs, complete)

    def without_stop_token(self, hypothesis: Hypothesis) -> str:
        """Return the text for a conversation's next prompt, whose template ends the turn itself."""
        tokens, reason = hypothesis.tokens, hypothesis.stop_reason
        return self._text(tokens[:-1] if reason == "stop" else tokens, reason)

    def _shown(self, tokens: Sequence[int], reason: StopReason | None) -> Sequence[int]:
        """Return the tokens of the text, with the stop token only if special tokens are kept."""
        return tokens[:-1] if reason == "stop" and self.skip else tokens

    def _text(self, shown: Sequence[int], reason: StopReason | None) -> str:
        text = self.tokenizer.decode(list(shown), skip_special_tokens=self.skip)
        if self.stops is not None and reason == "stop_string":
            text = text[: len(text) - self.stops.held(shown, ended=True)]
        return text
