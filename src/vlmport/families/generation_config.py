"""Read from a checkpoint when its model stops and how it samples.

generation_config.json takes precedence over config.json; null there counts as absent. All its
options go into the manifest. The generation_config.json for transformers.js holds only those that
it applies to greedy decoding as transformers does (checked in its 4.3.2): no sampling, because
captions are verified with `do_sample: false`, and no beams, because it silently returns one beam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

from vlmport.bundle import GenerationSpec
from vlmport.checkpoint import Checkpoint, Size, read_config
from vlmport.errors import ConfigError

FILE = "generation_config.json"

# Keys with their own field in the manifest, or without influence on which tokens are chosen.
NO_OPTIONS = frozenset(
    {
        "_from_model_config",
        "bos_token_id",
        "cache_implementation",
        "decoder_start_token_id",
        "eos_token_id",
        "max_new_tokens",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "return_dict_in_generate",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True)
class GreedyOptions:
    """The options that transformers.js applies to greedy decoding as transformers does."""

    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    min_new_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    suppress_tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Lengths:
    max_new_tokens: Size | None = None


@dataclass(frozen=True)
class Generation:
    """The generation settings of a checkpoint.

    Attributes:
        max_new_tokens: None where generation_config.json names none.
        defaults: every other option of generation_config.json, by its name there.
        greedy: those of them that transformers.js knows.
    """

    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int | None
    defaults: Mapping[str, Any]
    greedy: GreedyOptions

    @classmethod
    def read(cls, checkpoint: Checkpoint, text: Mapping[str, Any], where: str) -> Self:
        """Read generation_config.json, if there is one, and the decoder's config.

        Args:
            text: the decoder's section of config.json.
            where: what to call that section in errors.

        Raises ConfigError without a stop token, and for options of a wrong type.
        """
        raw = checkpoint.json(FILE) or {}
        stops = _stop_ids(raw, text, where)
        pads = (raw.get("pad_token_id"), text.get("pad_token_id"))
        return cls(
            stop_token_ids=stops,
            # Null, or -1 in old configs, means none: then batches are padded with the stop token.
            pad_token_id=next((pad for pad in pads if _is_id(pad)), stops[0]),
            max_new_tokens=read_config(_Lengths, raw, FILE).max_new_tokens,
            defaults={
                key: value
                for key, value in raw.items()
                if value is not None and key not in NO_OPTIONS
            },
            greedy=read_config(GreedyOptions, raw, FILE),
        )

    def spec(self, max_new_tokens: int, *, processors_see_prompt: bool) -> GenerationSpec:
        """Make the manifest's entry; `max_new_tokens` is the default for generation_config.json."""
        return GenerationSpec(
            stop_token_ids=self.stop_token_ids,
            pad_token_id=self.pad_token_id,
            max_new_tokens=self.max_new_tokens or max_new_tokens,
            processors_see_prompt=processors_see_prompt,
            defaults=self.defaults,
        )

    def hub_config(self, max_new_tokens: int) -> dict[str, Any]:
        """Make the bundle's generation_config.json, which transformers.js reads."""
        options = {
            key: value
            for key, value in dataclasses.asdict(self.greedy).items()
            if value is not None
        }
        return options | {
            "do_sample": False,
            "eos_token_id": list(self.stop_token_ids),
            "pad_token_id": self.pad_token_id,
            "max_new_tokens": max_new_tokens,
        }


def _stop_ids(
    generation: Mapping[str, Any], text: Mapping[str, Any], where: str
) -> tuple[int, ...]:
    """Read generation_config.json's eos ids, else the decoder's. Raises ConfigError without any."""
    eos, file = generation.get("eos_token_id"), FILE
    if eos is None:
        eos, file = text.get("eos_token_id"), where
    ids: list[Any] = eos if isinstance(eos, list) else [eos]
    if not ids or not all(_is_id(one) for one in ids):
        raise ConfigError(
            f"{file}: eos_token_id is {eos!r}, expected an id or a list of ids",
            hint="without a stop token, no caption would end",
            code="config.wrong-value",
        )
    return tuple(dict.fromkeys(ids))


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
