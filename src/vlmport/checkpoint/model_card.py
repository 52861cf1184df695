"""Read a checkpoint's own model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_card(folder: Path) -> dict[str, Any]:
    """Read the front matter of the README.md, empty if there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        text = path.read_text(encoding="utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card that YAML can't read says nothing about the model
        return {}


def base_model(folder: Path) -> str | None:
    """Return the name of the base model, if the card names one."""
    named = read_card(folder).get("base_model")
    if isinstance(named, list):
        named = named[0] if len(named) == 1 else None
    return named[:100] if isinstance(named, str) else None
