"""What is returned: texts, token ids, scores; all at once or piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from vlmport.runtime.search import Hypothesis, StopReason, TokenLogprob
from vlmport.runtime.text import StopStrings, TextStream


@dataclass(frozen=True)
class Answer:
    """One generated text; `str()` gives it.

    Attributes:
        text: without special tokens, and before a stop string.
        token_ids: as generated, the stop token and the tokens of a stop string included.
        stop_reason: 'stop' for a stop token, 'stop_string', or 'length' for max_new_tokens or a
            full context; None for a beam that had not ended when the search did.
        score: of beam search; None without.
        logprobs: one for each token, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason | None
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Caption(Answer):
    """The best answer, with what it cost.

    Attributes:
        timings: seconds in 'image' (reading and encoding), 'prefill' and 'decode'. Captions of
            one batch share the last two.
        counts: 'prompt_tokens'; 'image_tokens' and 'cached_tokens' (which a conversation had not to
            prefill again) among them; and 'new_tokens'.
        seed: of what was drawn, also where none was given; None where nothing is drawn.
        alternatives: the other answers of num_return_sequences, best first.
    """

    timings: Mapping[str, float]
    counts: Mapping[str, int]
    seed: int | None = None
    alternatives: tuple[Answer, ...] = ()


class AnswerText:
    """The text of token ids as they come, and at the end.

    Attributes:
        given: what the pieces amount to so far.
    """

    def __init__(self, tokenizer: Tokenizer, stops: StopStrings | None = None):
        self.tokenizer, self.stops = tokenizer, stops
        self.given = ""
        self._certain = ""
        self._stream = TextStream(tokenizer)

    def push(self, tokens: Sequence[int], stop_reason: StopReason | None) -> str:
        """The piece that is certain by now, '' for none; all of the rest once it has stopped.

        Args:
            tokens: all so far, the stop token included.
        """
        said = tokens[:-1] if stop_reason == "stop" else tokens
        for token in said[len(self._stream.tokens) :]:
            self._certain += self._stream.push(token)
        if stop_reason:
            self._certain += self._stream.finish()
        end = len(self._certain)
        if self.stops is not None and stop_reason in (None, "stop_string"):
            held = self.stops.held(said, ended=stop_reason == "stop_string")
            end = min(end, end + len(self._stream.pending) - held)
        piece = self._certain[len(self.given) : end]
        self.given += piece
        return piece

    def whole(self, hypothesis: Hypothesis) -> Answer:
        """All of an answer at once."""
        tokens, reason = hypothesis.tokens, hypothesis.stop_reason
        said = tokens[:-1] if reason == "stop" else tokens
        text = self.tokenizer.decode(list(said), skip_special_tokens=True)
        if self.stops is not None and reason == "stop_string":
            text = text[: len(text) - self.stops.held(said, ended=True)]
        return Answer(text, tokens, reason, hypothesis.score, hypothesis.logprobs)
