"""A checkpoint: config.json and lazy weights, from a folder or the Hub.

    checkpoint = Checkpoint.open("org/name")
    tensors = merged(checkpoint.weights, rename=family.rename, lora=LoraScale(r=16, alpha=16))
    tensors["language_model.model.norm.weight"].numpy()  # read now, float32

Nothing but headers is read until `numpy()`.

Each name is imported when it is first used: to open a bundle, only source.py is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmport.checkpoint.config import Layers, Signed, Size, read_config, subsection
    from vlmport.checkpoint.head import HeadNames
    from vlmport.checkpoint.lora import LoraScale
    from vlmport.checkpoint.opened import Checkpoint, merged
    from vlmport.checkpoint.source import locate, locate_adapter
    from vlmport.checkpoint.weights import LazyTensor, Weights
    from vlmport.files.json_files import load_json

__all__ = [
    "Checkpoint",
    "HeadNames",
    "Layers",
    "LazyTensor",
    "LoraScale",
    "Signed",
    "Size",
    "Weights",
    "load_json",
    "locate",
    "locate_adapter",
    "merged",
    "read_config",
    "subsection",
]

# Module → the names that it defines.
_HOMES = {
    "vlmport.checkpoint.config": ("Layers", "Signed", "Size", "read_config", "subsection"),
    "vlmport.checkpoint.head": ("HeadNames",),
    "vlmport.checkpoint.lora": ("LoraScale",),
    "vlmport.checkpoint.opened": ("Checkpoint", "merged"),
    "vlmport.checkpoint.source": ("locate", "locate_adapter"),
    "vlmport.checkpoint.weights": ("LazyTensor", "Weights"),
    "vlmport.files.json_files": ("load_json",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'vlmport.checkpoint' has no attribute {name!r}")
