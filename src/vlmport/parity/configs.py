"""Read a checkpoint's JSON files for the reference, without the code of the export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmport.errors import ConfigError, SourceError


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises SourceError, ConfigError."""
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(
            f"{folder}: no config.json",
            hint="give the folder that was exported",
            code="source.no-config",
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}", code="source.not-json") from error


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a decoder's config. Raises ConfigError unless it is a Llama's."""
    if config.get("model_type") != "llama":
        raise ConfigError(
            f"config.json: text_config.model_type {config.get('model_type')!r}",
            hint="the reference knows 'llama'",
            code="config.unsupported-value",
        )
    return dict(config)


def stop_token_ids(folder: Path, decoders: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the eos ids of generation_config.json if there is one, else the decoder's."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    value: int | Sequence[int] | None = generation.get("eos_token_id", decoders)
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
