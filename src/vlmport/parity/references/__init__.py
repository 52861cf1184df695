"""Load the reference that a bundle is compared with: Hugging Face transformers on PyTorch.

The modules of this folder and each family's `reference.py` are the only ones of the package that
import torch, transformers and peft, and they share no code with the export. Model, tokenizer,
processor and template come from transformers' `from_pretrained`, by its own rules, and LoRA is left
to PEFT, unmerged. A mistake in the export's reading, merging or arithmetic can therefore not repeat
itself here. Transformers has no class for distilvit2 alone: its reference assembles one from the
classes that exist.

`load_reference` imports the `reference.py` of the family that a checkpoint names.

B batch, S sequence, T image tokens, D hidden, V vocabulary, N new tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path

from vlmport.errors import ConfigError
from vlmport.families import reference_modules
from vlmport.parity.configs import read_config
from vlmport.parity.protocol import Reference
from vlmport.parity.reference_errors import reference_runs


def load_reference(
    folder: str | Path,
    *,
    image_token_id: int,
    adapter: str | Path | None = None,
    ignored: Collection[str] = (),
) -> Reference:
    """Load the reference of a checkpoint folder, by the model_type of its config.json.

    Args:
        image_token_id: the id of a patch in prompts, for a model that has none of its own
            (distilvit2).
        adapter: a PEFT folder that is put on top, after whatever LoRA the checkpoint holds.
        ignored: tensors of the checkpoint that may have no place in the model, because the export
            was told to leave them out. Nothing else is taken from a bundle.

    Raises SourceError, ConfigError, WeightError or AdapterError; VerificationError for what
    transformers refuses; ImportError without torch, transformers or peft.
    """
    folder = Path(folder)
    config = read_config(folder)
    modules = reference_modules()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in modules:
        raise ConfigError(
            f"{folder / 'config.json'}: no reference for model_type {model_type!r}",
            hint=f"known: {', '.join(modules)}",
            code="model.unsupported",
        )
    found = importlib.import_module(modules[model_type]).REFERENCE
    with reference_runs(f"loading {folder}"):
        return found(folder, config, image_token_id, adapter, ignored)
