"""`GenerationOptions`: how tokens are chosen, and when an answer ends.

Names, meanings and defaults are those of Hugging Face's `generate` (transformers 5.23), which has
neither OpenAI's two penalties nor its log-probabilities. Where it warns, this raises an error.
docs/decoding.md has the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlmport.errors import OptionError, OptionWarning, did_you_mean, quoted, warn
from vlmport.runtime.decoding import option_values as values
from vlmport.runtime.decoding.foreign_options import REFUSED, instead, name_here
from vlmport.runtime.decoding.option_values import TokenIds, whole_number
from vlmport.runtime.decoding.rng import new_seed

__all__ = ["GenerationOptions", "whole_number"]

WHERE = "generation_config.json:"

# Options of HF that mean something only when tokens are drawn, and only with several beams.
SAMPLING = (
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "seed",
)
GRAMMARS = ("json_schema", "regex", "lark_grammar")
BEAMS = ("early_stopping", "length_penalty")


@dataclass(frozen=True, repr=False)
class GenerationOptions:
    """Options of one generation: how tokens are chosen, and when an answer ends.

    `caption`, `generate`, `stream` and `ask` take them as keyword arguments, over the defaults of
    the bundle. None, for any of them, is the value that does nothing.

    Attributes:
        max_new_tokens: maximum number of new tokens. None takes the bundle's default.
        min_new_tokens: minimum number of new tokens before a stop token may be chosen.
        max_length: as max_new_tokens, with the tokens of the prompt counted too.
        min_length: as min_new_tokens, with the tokens of the prompt counted too.
        stop_strings: texts that end an answer. The answer ends before the text.
        do_sample: sample tokens at random instead of taking the most likely.
        num_beams: number of beams of beam search; 1 is greedy search or sampling.
        num_return_sequences: number of answers to return; more than 1 with beams or sampling.
        seed: random seed for sampling, from 0 to 2**32 - 1. None takes a new one and reports it.
        early_stopping: when beam search stops: True as soon as num_beams answers have ended, False
            when a better one is unlikely, "never" when none can be better.
        length_penalty: exponent of the length by which a beam's score is divided; above 0 favours
            long answers, below 0 short ones.
        sequence_bias: number to add to the score of the last token of a sequence, after its others.
        encoder_repetition_penalty: above 1 makes tokens of the prompt more likely.
        repetition_penalty: above 1 makes tokens that occurred less likely.
        presence_penalty: number to subtract from the score of each token that the answer has, as in
            OpenAI's API (-2 to 2).
        frequency_penalty: number to subtract from the score of a token for each time that the
            answer has it, as in OpenAI's API (-2 to 2).
        no_repeat_ngram_size: length in tokens of sequences that may not occur twice; 0 allows all.
        encoder_no_repeat_ngram_size: length in tokens of sequences of the prompt that may not occur
            in the answer; 0 allows all.
        bad_words_ids: sequences of token ids that may not occur.
        forced_eos_token_id: token ids, one of which ends an answer that reaches max_new_tokens.
        remove_invalid_values: replace NaN scores by 0 and infinite ones by the largest number.
        exponential_decay_length_penalty: (start, factor): after `start` tokens stop tokens get more
            likely, by the factor for each further token.
        suppress_tokens: token ids that are never chosen.
        begin_suppress_tokens: token ids that are not chosen as the first.
        temperature: number by which scores are divided before sampling; below 1 is less random.
        top_h: sample from the most likely tokens, up to this fraction of the entropy (0 to 1).
        top_k: sample from the k most likely tokens; 0 is all. 50 by default, as in Hugging Face's.
        top_p: sample from the smallest set of likely tokens with this total probability (0 to 1).
        min_p: drop tokens less likely than this fraction of the most likely one (0 to 1).
        typical_p: sample from the most typical tokens with this total probability (0 to 1).
        epsilon_cutoff: drop tokens less likely than this probability.
        eta_cutoff: as epsilon_cutoff, but lower where the entropy is high.
        renormalize_logits: make log-probabilities of the scores at the end.
        logprobs: number of alternatives to report with each token's log-probability; None reports
            neither.
        prompt_lookup_num_tokens: number of tokens to draft at a time from the text so far, which
            can save time and does not change the answer; None drafts none.
        max_matching_ngram_size: maximum length in tokens of the match that a draft continues.
        json_schema: JSON schema that the answer fits: a dict, its text, or a pydantic model. It is
            kept as text.
        regex: regular expression that the whole answer matches.
        lark_grammar: grammar that the whole answer matches, in llguidance's form of Lark.
        skip_special_tokens: leave special tokens out of the text (default True). With False the
            text is that of `processor.decode(ids, skip_special_tokens=False)`, with the stop token.

    Raises:
        OptionError: a value is out of its range, or two options contradict each other.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    max_length: int | None = None
    min_length: int = 0
    stop_strings: tuple[str, ...] = ()
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    seed: int | None = None
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    sequence_bias: tuple[tuple[TokenIds, float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[TokenIds, ...] = ()
    forced_eos_token_id: TokenIds = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()
    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    renormalize_logits: bool = False
    logprobs: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    json_schema: str | None = None
    regex: str | None = None
    lark_grammar: str | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in CHECKS:
            normal = _normalize(name, getattr(self, name))
            object.__setattr__(self, name, normal)  # a frozen dataclass may still tidy itself
        _refuse_contradictions(self)

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in CHECKS}
        facts = [f"{k}={quoted(v, 60)}" for k, v in given.items() if v != DEFAULTS[k]]
        return f"GenerationOptions({', '.join(facts)})"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationOptions:
        """Make options from keyword arguments. Raises OptionError for an unknown name."""
        return cls(**_without_refused(given))

    @classmethod
    def merged(
        cls,
        defaults: Mapping[str, Any],
        given: Mapping[str, Any],
        check_default: Callable[[str, Any], None] | None = None,
    ) -> GenerationOptions:
        """Merge the options of a call with the defaults of generation_config.json.

        The call's options count first. Defaults that have no meaning with them are dropped (a
        temperature where the call says do_sample=False), and so are names that are no options. An
        option given as None is the value that does nothing, whatever the default. A default that
        is not supported is left out, with an OptionWarning: the call did not ask for it.

        Args:
            defaults: the options of generation_config.json.
            given: the options of the call.
            check_default: called with the name and value of a default; raises OptionError where the
                model does not support it.

        Raises OptionError as the constructor does, and for unknown names in the call.
        """
        wanted = _without_refused(given)
        asked: dict[str, Any] = {}
        wrong: dict[str, OptionError] = {}
        for name in [one for one in defaults if one in CHECKS or one in REFUSED]:
            try:
                for one, value in _without_refused({name: defaults[name]}).items():
                    asked[one] = _normalize(one, value)
                    if check_default is not None and one not in given:
                        check_default(one, asked[one])
            except OptionError as error:
                asked.pop(name, None)
                wrong[name] = error
        ignored = {*given, *_ignored(asked, wanted)}
        for name in sorted(wrong.keys() - ignored):
            warning = OptionWarning(
                f"{WHERE} {wrong[name]}; left out", code="option.default-left-out"
            )
            warn(warning)
        merged = {name: value for name, value in asked.items() if name not in ignored} | wanted
        if not wanted.keys() >= {"do_sample", "num_beams"}:  # the call did not ask for both
            samples, beams = (merged.get(name) for name in ("do_sample", "num_beams"))
            if samples and (beams or 1) > 1:
                merged.setdefault("seed", new_seed())
        return cls(**merged)

    def max_new_tokens_after(self, prompt_tokens: int) -> int | None:
        """Return max_new_tokens, or what max_length leaves after the prompt; None is no limit."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        return max(self.max_length - prompt_tokens, 0)

    def min_new_tokens_after(self, prompt_tokens: int) -> int:
        """Return min_new_tokens, or what min_length asks for after the prompt."""
        return self.min_new_tokens or max(self.min_length - prompt_tokens, 0)


_POSITIVE = values.number_in("a number above 0", 1.2, lambda number: 1e-30 < number < 1e30)
_PART = values.number_in("a number above 0 and at most 1", 0.9, lambda number: 0 < number <= 1)
_SUBTRACTED = values.number_in("a number from -2 to 2", 0.5, lambda number: -2 <= number <= 2)
_CUTOFF = values.number_in("a number from 0 to below 1", 3e-4, lambda number: 0 <= number < 1)

CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": values.at_least(1),
    "min_new_tokens": values.at_least(0),
    "max_length": values.at_least(1),
    "min_length": values.at_least(0),
    "stop_strings": values.strings,
    "do_sample": values.flag,
    "num_beams": values.at_least(1, 65),
    "num_return_sequences": values.at_least(1, 65),
    "seed": values.at_least(0, 2**32),
    "early_stopping": values.flag_or_never,
    "length_penalty": values.number_in(
        "a number from -5 to 5", 1.0, lambda number: -5 <= number <= 5
    ),
    "sequence_bias": values.sequence_bias,
    "encoder_repetition_penalty": _POSITIVE,
    "repetition_penalty": _POSITIVE,
    "presence_penalty": _SUBTRACTED,
    "frequency_penalty": _SUBTRACTED,
    "no_repeat_ngram_size": values.at_least(0),
    "encoder_no_repeat_ngram_size": values.at_least(0),
    "bad_words_ids": values.token_sequences,
    "forced_eos_token_id": values.token_ids,
    "remove_invalid_values": values.flag,
    "exponential_decay_length_penalty": values.decay,
    "suppress_tokens": values.token_ids,
    "begin_suppress_tokens": values.token_ids,
    "temperature": values.temperature,
    "top_h": _PART,
    "top_k": values.at_least(0),
    "top_p": _PART,
    "min_p": values.number_in("a number from 0 to 1", 0.05, lambda number: 0 <= number <= 1),
    "typical_p": _PART,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "renormalize_logits": values.flag,
    "logprobs": values.at_least(0),
    "prompt_lookup_num_tokens": values.at_least(1),
    "max_matching_ngram_size": values.at_least(1),
    "json_schema": values.schema,
    "regex": values.pattern,
    "lark_grammar": values.grammar,
    "skip_special_tokens": values.flag,
}

DEFAULTS: Mapping[str, Any] = {
    field.name: field.default for field in dataclasses.fields(GenerationOptions)
}
NOTHING: Mapping[str, Any] = {**DEFAULTS, "top_k": 0}  # None asks for nothing, not for the default


def _without_refused(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options among `given`. Raises OptionError for unknown names, and for what is refused."""
    unknown = [name for name in given if name not in CHECKS and name not in REFUSED]
    if unknown:
        named = ", ".join(f"{quoted(name)}{_near(name)}" for name in unknown[:8])
        hints = [hint for name in unknown if (hint := instead(name)) is not None]
        listed = "docs/decoding.md describes the options"
        if not all(map(_near, unknown)):
            listed = f"known: {', '.join(CHECKS)}"
        raise OptionError(
            f"unknown option {named}",
            hint=hints[0] if hints else listed,
            code="option.unknown",
        )
    for name, (neutral, hint) in REFUSED.items():
        if name in given and not any(given[name] is one or given[name] == one for one in neutral):
            raise OptionError(
                f"option {name}={quoted(given[name])} is not supported",
                hint=hint,
                code="option.unsupported",
            )
    return {name: value for name, value in given.items() if name in CHECKS}


def _near(name: str) -> str:
    """The name that another program's option has here, else the nearest name."""
    here = name_here(name)
    if here in CHECKS:
        return f" (did you mean {here!r}?)"
    return "" if instead(name) else did_you_mean(name, CHECKS)


def _normalize(name: str, value: Any) -> Any:
    """Check and normalize a value. None is the value that does nothing."""
    return NOTHING[name] if value is None else CHECKS[name](name, value)


def _ignored(asked: Mapping[str, Any], wanted: Mapping[str, Any]) -> set[str]:
    """Return the defaults that have no effect with the call's options and the other defaults."""
    both = {
        **DEFAULTS,
        **asked,
        **{name: _normalize(name, value) for name, value in wanted.items()},
    }
    samples, beams, returned = both["do_sample"], both["num_beams"], both["num_return_sequences"]
    forced, most = both["forced_eos_token_id"], both["max_new_tokens"]
    ignored = {"max_length"}  # the bundle's max_new_tokens replaces it: it counts image tokens
    if not samples:
        ignored.update(SAMPLING)
    if beams == 1:
        ignored.update(BEAMS)
    if returned > beams and not (samples and beams == 1):
        ignored.add("num_return_sequences")
    if beams > 1 or returned > 1:
        ignored.add("prompt_lookup_num_tokens")
    if wanted.keys() & {"max_new_tokens", "max_length"}:
        ignored.update(("max_new_tokens", "min_new_tokens", "min_length"))
    if wanted.keys() & {"min_new_tokens", "min_length"} or "min_new_tokens" in asked:
        ignored.add("min_length")
    if "min_length" in wanted or (most is not None and both["min_new_tokens"] > most):
        ignored.add("min_new_tokens")
    if forced and set(forced) <= set(both["suppress_tokens"]):
        ignored.add("suppress_tokens" if "forced_eos_token_id" in wanted else "forced_eos_token_id")
    grammars = [name for name in GRAMMARS if both[name] is not None]
    chosen = next((name for name in grammars if name in wanted), next(iter(grammars), None))
    ignored.update(name for name in grammars if name != chosen)
    return ignored


def _refuse_contradictions(options: GenerationOptions) -> None:
    """Raise OptionError for the first options that contradict each other."""
    for holds, said, hint in _contradictions(options):
        if holds:
            raise OptionError(said, hint=hint, code="option.contradiction")


def _contradictions(options: GenerationOptions) -> list[tuple[bool, str, str]]:
    """List the contradictions: whether each is there, its message, and its hint."""
    o = options
    most, least, forced = o.max_new_tokens, o.min_new_tokens, o.forced_eos_token_id
    drawing, of_beams = _set_options(o, SAMPLING), _set_options(o, BEAMS)
    several = o.num_beams > 1 or o.num_return_sequences > 1
    grammars = [name for name in GRAMMARS if getattr(o, name) is not None]
    return [
        (
            most is not None and least > most,
            f"min_new_tokens={least} is more than max_new_tokens={most}",
            "raise one or lower the other",
        ),
        (
            o.max_length is not None and o.min_length > o.max_length,
            f"min_length={o.min_length} is more than max_length={o.max_length}",
            "raise one or lower the other",
        ),
        (
            most is not None and o.max_length is not None,
            f"max_new_tokens={most} and max_length={o.max_length}",
            "give one of them; max_length counts the prompt too",
        ),
        (
            bool(least and o.min_length),
            f"min_new_tokens={least} and min_length={o.min_length}",
            "give one of them; min_length counts the prompt too",
        ),
        (
            not o.do_sample and bool(drawing),
            f"{' and '.join(drawing)} without do_sample=True",
            f"add do_sample=True, or leave out {' and '.join(drawing)}: only sampling uses it",
        ),
        (
            o.num_beams == 1 and bool(of_beams),
            f"{' and '.join(of_beams)} without beams",
            "give num_beams=2 or more too, or leave it out",
        ),
        (
            o.num_return_sequences > o.num_beams and not (o.do_sample and o.num_beams == 1),
            f"num_return_sequences={o.num_return_sequences} is more than num_beams={o.num_beams}",
            "raise num_beams, or sample with do_sample=True and without beams",
        ),
        (
            o.do_sample and o.num_beams > 1 and o.seed is None,
            f"num_beams={o.num_beams} with do_sample=True, without a seed",
            "give seed=0 or another, or do_sample=False: then beams find the likeliest text",
        ),
        (
            bool(forced) and set(forced) <= set(o.suppress_tokens),
            f"forced_eos_token_id={list(forced)} is in suppress_tokens",
            "take it out of one of them; min_new_tokens keeps a text from ending early",
        ),
        (len(grammars) > 1, " and ".join(grammars), "give one of them"),
        (
            o.prompt_lookup_num_tokens is not None and several,
            "prompt_lookup_num_tokens with several sequences",
            "leave it out, or num_beams and num_return_sequences",
        ),
    ]


def _set_options(options: GenerationOptions, names: Sequence[str]) -> list[str]:
    """Return the names whose option is set to something other than its default."""
    return [name for name in names if getattr(options, name) not in (DEFAULTS[name], NOTHING[name])]
