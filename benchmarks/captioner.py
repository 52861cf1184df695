"""The captioner that benchmarks run, at its real size and with random weights.

SigLIP-base-224, a linear projection and SmolLM-135M in distilvit2's checkpoint format, bfloat16:
what a figure depends on are the shapes, not the values. `SMALL` is for trying a script out.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkpoint writer is the tests'

from tests.checkpoints import write_json, write_prefix_checkpoint  # noqa: E402


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


def write_parts(checkpoint: Path, folder: Path, size: Size) -> None:
    """What engines are made from: `tower.safetensors`, and `llama`, a Hugging Face folder.

    The checkpoint is one without LoRA.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    towers = ("vision_encoder.", "projection.")
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith(towers)}
    save_file(tower, folder / "tower.safetensors")
    llama = folder / "llama"
    llama.mkdir()
    language = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("language_model.")
    }
    save_file(language, llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    write_json(llama / "config.json", {**config, "architectures": ["LlamaForCausalLM"]})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(checkpoint / name, llama / name)
