"""Process a row of scores before a token is chosen, as the options ask for.

Each function makes a processor from an option's value; `new_processors` puts those that a request
needs in the order of Hugging Face's `generate`. A processor is a pure function: the same scores
after the same tokens give the same result. It may write to the scores that it gets.

All arithmetic is float32, number by number, as torch does it.

Source: transformers 5.23, generation/utils.py `_get_logits_processor` and logits_process.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import OptionError, cut
from vlmport.runtime.decoding.option_values import TokenIds
from vlmport.runtime.decoding.options import DEFAULTS, GenerationOptions
from vlmport.runtime.decoding.score_rows import FORBIDDEN, log_softmax
from vlmport.runtime.decoding.warpers import new_warpers

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int64

    Scores = Float32[np.ndarray, " V"]

OF_PROMPT = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
LARGEST = float(np.finfo(np.float32).max)
Mask = Callable[[Sequence[int]], "Bool[np.ndarray, ' V']"]
"""Returns which tokens may follow a row's new tokens. A pure function of them, because beams call
it in any order; it may cache results."""


@dataclass(frozen=True)
class Row:
    """The tokens before a row's next token.

    Attributes:
        prompt: the prompt's tokens; empty where processors see new tokens only.
        tokens: the new tokens.
    """

    prompt: Int64[np.ndarray, " P"]
    tokens: Sequence[int]

    @cached_property
    def seen(self) -> Int64[np.ndarray, " N"]:
        """All tokens that processors see."""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int64)])


Processor = Callable[["Scores", Row], "Scores"]
# Only for processors that compute: entering it costs more than forbidding tokens.
ignoring_overflow = np.errstate(over="ignore", invalid="ignore")


@dataclass(frozen=True)
class Processors:
    """All of a request's processors, in order."""

    prompt: Int64[np.ndarray, " P"]
    in_order: tuple[Processor, ...]

    def __call__(self, scores: Scores, tokens: Sequence[int]) -> Scores:
        """Process the scores of the token after `tokens`; `scores` may be written to."""
        row = Row(self.prompt, tokens)
        for processor in self.in_order:
            scores = processor(scores, row)
        return scores


def new_processors(
    options: GenerationOptions,
    *,
    prompt_ids: Sequence[int],
    processors_see_prompt: bool,
    stop_token_ids: frozenset[int],
    max_new_tokens: int,
    vocab_size: int,
    mask: Mask | None,
) -> Processors:
    """Make the processors that the options ask for, in order.

    Raises OptionError for token ids that are not below vocab_size, and for options that look at a
    prompt where processors see none.
    """
    o = options
    for name in vars(o):
        check_served(name, getattr(o, name), vocab_size, processors_see_prompt)

    def below(ids: Iterable[int]) -> Int64[np.ndarray, " N"]:
        return np.array([one for one in ids if one < vocab_size], np.int64)

    prompt = np.array(prompt_ids if processors_see_prompt else (), np.int64)
    stops = below(stop_token_ids)
    least = o.min_new_tokens_after(len(prompt_ids))
    found: list[Processor | None] = [
        biased(dict(o.sequence_bias)) if o.sequence_bias else None,
        penalized_prompt(1 / o.encoder_repetition_penalty, below(prompt.tolist()))
        if o.encoder_repetition_penalty != 1
        else None,
        penalized(o.repetition_penalty, vocab_size) if o.repetition_penalty != 1 else None,
        penalized_answer(o.presence_penalty, o.frequency_penalty)
        if o.presence_penalty or o.frequency_penalty
        else None,
        no_repeated_ngrams(o.no_repeat_ngram_size, vocab_size) if o.no_repeat_ngram_size else None,
        no_ngrams_of(prompt, o.encoder_no_repeat_ngram_size)
        if o.encoder_no_repeat_ngram_size
        else None,
        biased(_forbidden_words(o, stop_token_ids)) if o.bad_words_ids else None,
        forbidden_until(least, stops) if least and len(stops) else None,
        masked(mask) if mask else None,
        forced_at(max_new_tokens - 1, np.array(o.forced_eos_token_id, np.int64))
        if o.forced_eos_token_id
        else None,
        valid if o.remove_invalid_values else None,
        likelier(*o.exponential_decay_length_penalty, stops)
        if o.exponential_decay_length_penalty and len(stops)
        else None,
        forbidden_until(None, below(o.suppress_tokens)) if o.suppress_tokens else None,
        forbidden_until(1, below(o.begin_suppress_tokens)) if o.begin_suppress_tokens else None,
    ]
    if o.do_sample:
        keep = len(stop_token_ids) + 1 if o.num_beams > 1 else 1
        found += [_of_scores(warper) for warper in new_warpers(o, keep)]
    if o.renormalize_logits:
        found.append(_of_scores(log_softmax))
    return Processors(prompt, tuple(one for one in found if one))


def biased(biases: Mapping[TokenIds, float]) -> Processor:
    """Add to the score of each sequence's last token, if its other tokens come before it."""
    alone = {ids[0]: np.float32(bias) for ids, bias in biases.items() if len(ids) == 1}
    longer: dict[
        int, dict[TokenIds, list[tuple[int, np.float32]]]
    ] = {}  # by the tokens before the last one
    for ids, bias in biases.items():
        if len(ids) > 1:
            known = longer.setdefault(len(ids) - 1, {})
            known.setdefault(ids[:-1], []).append((ids[-1], np.float32(bias)))
    longest = max(longer, default=0)

    @ignoring_overflow
    def process(scores: Scores, row: Row) -> Scores:
        added = dict(alone)
        last = tuple(row.seen[-longest:].tolist()) if longest else ()
        for before, known in longer.items():
            if before <= len(last):
                for token, bias in known.get(last[-before:], ()):
                    added[token] = added.get(token, np.float32(0)) + bias
        scores[list(added)] += np.array(list(added.values()), np.float32)
        return scores

    return process


def penalized(penalty: float, vocab_size: int) -> Processor:
    """Make tokens that occurred before less likely (above 1)."""
    factor = np.float32(penalty)

    def process(scores: Scores, row: Row) -> Scores:
        seen = row.seen[row.seen < vocab_size]
        return _penalize(scores, seen, factor)

    return process


def penalized_prompt(penalty: float, prompt: Int64[np.ndarray, " P"]) -> Processor:
    """Make the prompt's tokens less likely (above 1), or more likely (below 1)."""
    factor = np.float32(penalty)
    return lambda scores, row: _penalize(scores, prompt, factor)


def penalized_answer(presence: float, frequency: float) -> Processor:
    """Subtract `presence` from the score of each new token so far, and `frequency` for each time.

    Source: OpenAI, API reference, frequency and presence penalties: the scores before temperature,
    and the tokens of the answer, not those of the prompt.
    """

    @ignoring_overflow
    def process(scores: Scores, row: Row) -> Scores:
        if row.tokens:
            ids, counts = np.unique(np.array(row.tokens, np.int64), return_counts=True)
            taken = counts.astype(np.float32) * np.float32(frequency) + np.float32(presence)
            scores[ids] -= taken
        return scores

    return process


@ignoring_overflow
def _penalize(scores: Scores, ids: Int64[np.ndarray, " N"], factor: np.float32) -> Scores:
    old = scores[ids]
    scores[ids] = np.where(old < 0, old * factor, old / factor)
    return scores


def no_repeated_ngrams(size: int, vocab_size: int) -> Processor:
    """Forbid each token that would complete an n-gram that occurred before."""

    def process(scores: Scores, row: Row) -> Scores:
        if len(row.seen) >= size:
            tokens = _completing(row.seen, row.seen, size)
            scores[tokens[tokens < vocab_size]] = FORBIDDEN
        return scores

    return process


def no_ngrams_of(prompt: Int64[np.ndarray, " P"], size: int) -> Processor:
    """Forbid each token that would complete an n-gram of the prompt."""

    def process(scores: Scores, row: Row) -> Scores:
        if len(row.seen) >= size - 1:
            tokens = _completing(prompt, row.seen, size)
            scores[tokens[tokens < len(scores)]] = FORBIDDEN
        return scores

    return process


def _completing(
    among: Int64[np.ndarray, " N"], seen: Int64[np.ndarray, " M"], size: int
) -> Int64[np.ndarray, " K"]:
    """Find the tokens that follow, anywhere in `among`, the last size - 1 tokens of `seen`."""
    places = len(among) - size + 1
    if places < 1:
        return among[:0]
    fits = np.ones(places, np.bool_)
    for offset in range(size - 1):
        fits &= among[offset : offset + places] == seen[len(seen) - size + 1 + offset]
    return among[size - 1 :][fits]


def forbidden_until(count: int | None, ids: Int64[np.ndarray, " N"]) -> Processor:
    """Forbid some tokens until there are `count` new tokens; None forbids them always."""

    def process(scores: Scores, row: Row) -> Scores:
        if count is None or len(row.tokens) < count:
            scores[ids] = FORBIDDEN
        return scores

    return process


def masked(mask: Mask) -> Processor:
    """Forbid the tokens that the mask does not allow."""

    def process(scores: Scores, row: Row) -> Scores:
        scores[~mask(row.tokens)] = FORBIDDEN
        return scores

    return process


def forced_at(count: int, ids: Int64[np.ndarray, " N"]) -> Processor:
    """Force one of `ids` as token number `count`, each with the same score."""

    def process(scores: Scores, row: Row) -> Scores:
        if len(row.tokens) == count:
            scores[:] = FORBIDDEN
            scores[ids] = 0
        return scores

    return process


def valid(scores: Scores, row: Row) -> Scores:
    """Replace NaN by 0, and infinities by the largest numbers."""
    return np.nan_to_num(scores, copy=False, nan=0.0, posinf=LARGEST, neginf=-LARGEST)


def likelier(start: int, factor: float, ids: Int64[np.ndarray, " N"]) -> Processor:
    """Past `start` new tokens, add |score| · (factor ** tokens past it - 1) to some scores."""

    @ignoring_overflow
    def process(scores: Scores, row: Row) -> Scores:
        past = len(row.tokens) - start
        if past > 0:
            old = scores[ids]
            grown = np.abs(old) * np.float32(_power(factor, past) - 1)
            grown = old + np.where(np.isfinite(old), grown, np.float32(0))
            scores[ids] = np.minimum(
                grown, LARGEST
            )  # sure to be chosen; infinity would be an error
        return scores

    return process


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return LARGEST


def _of_scores(warper: Callable[[Scores], Scores]) -> Processor:
    return ignoring_overflow(lambda scores, row: warper(scores))


def _forbidden_words(
    options: GenerationOptions, stop_token_ids: frozenset[int]
) -> dict[TokenIds, float]:
    """Convert bad words to biases. A single stop token is not forbidden, as in HF."""
    return {
        ids: -np.inf
        for ids in options.bad_words_ids
        if len(ids) > 1 or not stop_token_ids.issuperset(ids)
    }


def check_served(name: str, value: Any, vocab_size: int, processors_see_prompt: bool) -> None:
    """Raise OptionError for an option that this model can't serve.

    These are token ids outside the vocabulary (suppressed ones may be outside), and options that
    look at the prompt where processors see none.
    """
    if not processors_see_prompt and name in OF_PROMPT and value != DEFAULTS[name]:
        raise OptionError(
            f"{name}={value}: this model has no prompt tokens to look at",
            hint="leave it out; repetition_penalty and no_repeat_ngram_size see new tokens",
            code="option.not-for-this-model",
        )
    named: Iterable[int] = ()
    if name == "forced_eos_token_id":
        named = value
    elif name == "bad_words_ids":
        named = [one for word in value for one in word]
    elif name == "sequence_bias":
        named = [one for ids, _ in value for one in ids]
    wrong = sorted({one for one in named if one >= vocab_size})
    if wrong:
        raise OptionError(
            f"{name}: {cut(', '.join(map(str, wrong)))} not in a vocabulary of {vocab_size} tokens",
            hint=f"use ids below {vocab_size}, from this model's tokenizer",
            code="option.wrong-value",
        )
