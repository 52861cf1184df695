"""`GenerateOptions`: the keyword arguments of every method that generates, with their types.

Type checkers and editors read them from here. `GenerationOptions` in options.py says what each
option does, and checks its value; a test keeps the two in step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

__all__ = ["GenerateOptions"]

Ids = Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `caption`, `caption_each`, `generate`, `stream` and `ask`.

        options: vlmport.GenerateOptions = {"max_new_tokens": 50, "num_beams": 3}
        model.caption("photo.jpg", **options)

    `GenerationOptions` describes each of them. An option that is left out has the bundle's default;
    None is the value that does nothing.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    max_length: int | None
    min_length: int | None
    stop_strings: str | Sequence[str] | None
    do_sample: bool | None
    num_beams: int | None
    num_return_sequences: int | None
    seed: int | None
    early_stopping: bool | Literal["never"] | None
    length_penalty: float | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]] | None
    encoder_repetition_penalty: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Ids] | None
    forced_eos_token_id: int | Ids | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: int | Ids | None
    begin_suppress_tokens: int | Ids | None
    temperature: float | None
    top_h: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    renormalize_logits: bool | None
    logprobs: int | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    json_schema: Mapping[str, Any] | str | bool | type | None
    regex: str | None
    lark_grammar: str | None
    skip_special_tokens: bool | None
