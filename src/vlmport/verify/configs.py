"""A checkpoint's JSON files, as the reference reads them: by itself, not by the export's code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vlmport.errors import ConfigError, SourceError


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder}: no config.json", hint="give the folder that was exported")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != "llama":
        raise ConfigError(
            f"config.json: text_config.model_type {config.get('model_type')!r}",
            hint="the reference knows 'llama'",
        )
    return dict(config)


def stop_token_ids(folder: Path, decoders: int | Sequence[int] | None) -> tuple[int, ...]:
    """The eos ids of generation_config.json if there is one, else the decoder's."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    value: int | Sequence[int] | None = generation.get("eos_token_id", decoders)
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def answer_stop_ids(
    folder: Path, decoders: int | Sequence[int] | None, processor: Any
) -> tuple[int, ...]:
    """`stop_token_ids`, the tokenizer's eos token and what the template writes after an answer."""
    others = (processor.tokenizer.eos_token_id, _end_of_turn(processor))
    stops = stop_token_ids(folder, decoders)
    return tuple(dict.fromkeys((*stops, *(one for one in others if one is not None))))


def _end_of_turn(processor: Any) -> int | None:
    """The special token that comes next after what an assistant said.

    None where the template writes none there, or refuses such a message.
    """
    said = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "?"), ("assistant", "Ja"))
    ]
    try:
        _, *after = processor.apply_chat_template(said).split("Ja")
    except TemplateError:
        return None
    kinds = processor.tokenizer.added_tokens_decoder
    text = after[-1].strip() if after else ""
    first = processor.tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    return next((one for one in first if one in kinds and kinds[one].special), None)


def processor_template(folder: Path) -> str | None:
    """The processor's own chat template, which counts before the tokenizer's."""
    plain, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if wrapped.is_file():
        return json.loads(wrapped.read_text(encoding="utf-8")).get("chat_template")
    return None
