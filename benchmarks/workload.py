"""What every engine of peers.py is given, so that all do the same work.

Files of a workload's folder:

    checkpoint/         the model as vlmport reads it
    llama/              its language model as a Hugging Face folder
    bundle/             exported by vlmport
    workload.json       the numbers below
    inputs-N.npz        vlmport's vision inputs of a picture that is N images to the tower
    pixels-N.npy        the same for the others, f32[N, 3, H, W]
    prompt.npy          ids i64[S] of a request, image tokens among them; absent where none is timed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from vlmport.benchmark.picture import gradient
from vlmport.bundle import Bundle
from vlmport.runtime.model import VLM

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Workload:
    """The numbers of a workload.

    Attributes:
        images: numbers of images to encode; the last is that of a request.
        lengths: of the prompts, in tokens.
        new_tokens: of a request.
    """

    images: tuple[int, ...]
    lengths: tuple[int, ...]
    vocab_size: int
    image_token_id: int
    new_tokens: int

    @classmethod
    def read(cls, folder: Path) -> Workload:
        fields = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
        return cls(tuple(fields.pop("images")), tuple(fields.pop("lengths")), **fields)

    def write(self, folder: Path) -> None:
        (folder / "workload.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    def ids(self, length: int) -> np.ndarray:
        """Ids i64[S] all over the vocabulary but for the image token; for every engine the same."""
        ids = np.random.default_rng(length).integers(0, self.vocab_size, length)
        return np.where(ids == self.image_token_id, 0, ids)


def write_workload(
    folder: Path,
    bundle: Bundle,
    pictures: Mapping[tuple[int, int], Mapping[str, Any]],
    *,
    question: str | None,
    lengths: tuple[int, ...],
    new_tokens: int,
) -> Workload:
    """Pictures as the bundle makes them, and a request about the last.

    Args:
        pictures: (width, height) → the image processor's options.
        question: None for no request; the lengths are then those given, else also the request's.
    """
    with VLM.open(bundle) as vlm:
        images, picture = [], None
        for (width, height), options in pictures.items():
            picture = vlm.components.process_image(gradient(width, height), options)
            pixels = picture.inputs["pixel_values"]
            pixels = pixels.reshape(-1, *pixels.shape[-3:])
            images.append(len(pixels))
            np.savez(folder / f"inputs-{len(pixels)}.npz", **picture.inputs)
            np.save(folder / f"pixels-{len(pixels)}.npy", pixels)
        if question is not None and picture is not None:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = vlm.asker.text_ids([{"role": "user", "content": content}])
            prompt = vlm.asker.prompter.splice(text, [picture.prompt_ids])
            np.save(folder / "prompt.npy", prompt)
            lengths = (*lengths, len(prompt))
    dims, token = bundle.manifest.dims, bundle.manifest.prompt.image_token_id
    workload = Workload(tuple(images), lengths, dims.vocab_size, token, new_tokens)
    workload.write(folder)
    return workload


def write_llama(checkpoint: Path, folder: Path, prefix: str, replacement: str = "") -> None:
    """The language model of a checkpoint as a Hugging Face folder of its own.

    Tensors whose names begin with `prefix` are taken, with `replacement` in its place, and an
    untied head.
    """
    folder.mkdir()
    tensors = {
        name.replace(prefix, replacement, 1): tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
        if name.startswith((prefix, "lm_head."))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    llama = {
        **config["text_config"],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(llama), encoding="utf-8")
    for name in TOKENIZER:
        shutil.copyfile(checkpoint / name, folder / name)
