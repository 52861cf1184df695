"""The truth that a bundle is compared with: Hugging Face transformers on PyTorch.

The modules of this folder are the only ones of the package that import torch, transformers and
peft, and they share no code with the export. Model, tokenizer, processor and template come from
transformers' `from_pretrained`, by its own rules, and LoRA is left to PEFT, unmerged. A mistake in
the export's reading, merging or arithmetic can therefore not repeat itself here. distilvit2 alone,
which transformers has no class for, is put together here (`prefix.py`).

One module a family; `load_reference` imports the one that a checkpoint needs.

B batch, S sequence, T image tokens, D hidden, V vocabulary, N new tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path

from vlmport.errors import ConfigError
from vlmport.verify.configs import read_config
from vlmport.verify.protocol import Reference
from vlmport.verify.refusals import reference_runs

# model_type → the module here and its class
REFERENCES = {
    "prefix_conditioning_vlm": ("prefix", "PrefixReference"),
    "idefics3": ("idefics3", "Idefics3Reference"),
    "smolvlm": ("idefics3", "Idefics3Reference"),
    "qwen2_5_vl": ("qwen_vl", "QwenVLReference"),
    "qwen3_vl": ("qwen_vl", "QwenVLReference"),
}


def load_reference(
    folder: str | Path,
    *,
    image_token_id: int,
    adapter: str | Path | None = None,
    ignored: Collection[str] = (),
) -> Reference:
    """The reference of a checkpoint folder, by its config.json's model_type.

    Args:
        image_token_id: the id that stands for a patch in prompts, for a model that has none of its
            own (distilvit2).
        adapter: a PEFT folder that is put on top, after whatever LoRA the checkpoint holds.
        ignored: tensors of the checkpoint that need no place in the model: those that the export
            was told to leave out. Nothing else is taken from a bundle.

    Raises SourceError, ConfigError, WeightError or AdapterError; VerificationError for what
    transformers refuses; ImportError without torch, transformers or peft.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in REFERENCES:
        raise ConfigError(
            f"{folder / 'config.json'}: no reference for model_type {family!r}",
            hint=f"known: {', '.join(REFERENCES)}",
            code="model.unsupported",
        )
    module, name = REFERENCES[family]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    with reference_runs(f"loading {folder}"):
        return found(folder, config, image_token_id, adapter, ignored)
