"""Small trained checkpoints in the package, so that a first try needs no download.

The recipes that train them are in `training/` of the repository.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

# Name → what it does, for `vlmport models`.
DESCRIPTIONS = {
    "shapes": "captions images of circles, squares, triangles and stars (prefix)",
    "shapes-smolvlm": "captions such images and answers questions about them (idefics3)",
    "shapes-qwen2.5-vl": "the same, for images of many sizes (qwen2_5_vl)",
    "shapes-qwen3-vl": "the same, for images of many sizes (qwen3_vl)",
}

# The ones that a command takes by default.
CAPTIONER, ANSWERER = "shapes", "shapes-smolvlm"


def builtin_models() -> dict[str, Path]:
    """Map name → checkpoint folder."""
    root = Path(str(resources.files(__name__)))
    return {name: root / name for name in DESCRIPTIONS}


def builtin_folder(source: str | Path) -> Path | None:
    """Return the checkpoint of a built-in name; None for others, and for a folder of that name."""
    folder = builtin_models().get(str(source))
    return None if folder is None or Path(source).exists() else folder
