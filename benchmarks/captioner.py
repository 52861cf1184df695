"""The captioner that benchmarks run, at its real size and with random weights.

SigLIP-base-224, a linear projection and SmolLM-135M in distilvit2's checkpoint format, bfloat16:
what a figure depends on are the shapes, not the values. `SMALL` is for trying a script out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from workload import Workload, write_llama, write_workload

from vlmport.exporter import export

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkpoint writer is the tests'

from tests.checkpoints import write_prefix_checkpoint  # noqa: E402

LENGTHS = (100, 1100)


class Size(NamedTuple):
    vision: dict[str, Any]
    text: dict[str, Any]


REAL = Size(
    vision={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "image_size": 224, "patch_size": 16,
    },
    text={
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
        "vocab_size": 49152, "max_position_embeddings": 2048,
    },
)  # fmt: skip
SMALL = Size(
    vision=REAL.vision | {"num_hidden_layers": 2},
    text=REAL.text | {"num_hidden_layers": 2, "vocab_size": 2048},
)


def write_captioner(
    folder: Path, size: Size, *, lora: bool = True, spelling: Literal["v4", "v5"] = "v5"
) -> Path:
    """A checkpoint of that size, with pairs of rank 16 unless they are left out."""
    return write_prefix_checkpoint(
        folder,
        spelling=spelling,
        dtype="BF16",
        lora=lora,
        vision=size.vision,
        text=size.text,
        config={"lora_r": 16, "lora_alpha": 16, "projection_dim": size.text["hidden_size"]},
    )


def write_model(
    folder: Path, precisions: str, *, small: bool, tokenizer: Path | None = None
) -> Workload:
    """The folder that `workload.py` describes, without LoRA: one picture, and prompts of text."""
    if tokenizer is not None:
        raise ValueError("the captioner's prompts are ids: it takes no tokenizer")
    checkpoint = write_captioner(folder / "checkpoint", SMALL if small else REAL, lora=False)
    write_llama(checkpoint, folder / "llama", "language_model.")
    bundle = export(checkpoint, folder / "bundle", precisions=precisions)
    pictures: dict[tuple[int, int], dict[str, Any]] = {(224, 224): {}}
    return write_workload(folder, bundle, pictures, question=None, lengths=LENGTHS, new_tokens=0)
