"""The parts of the models in torch, as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from captioner import Size
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim
from transformers import (
    DynamicCache,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.cache_utils import DynamicLayer

Example = tuple[tuple[Any, ...], list[str], list[str], dict[str, dict[int, str]]]


class Tower(nn.Module):
    """pixel_values [B, 3, H, W] → image features [B, N, D]."""

    def __init__(self, size: Size):
        super().__init__()
        config = SiglipVisionConfig(**{**size.vision, "vision_use_head": False})
        self.encoder = SiglipVisionModel(config)
        self.projection = nn.Linear(size.vision["hidden_size"], size.text["hidden_size"])
        self.side = size.vision["image_size"]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.encoder(pixel_values).last_hidden_state)

    def example(self, past: int, new: int) -> Example:
        pixels = torch.zeros(2, 3, self.side, self.side)
        return (pixels,), ["pixel_values"], ["image_features"], {"pixel_values": {0: "batch_size"}}

    def dynamic_shapes(self) -> Any:
        return ({0: Dim("batch_size")},)


class Decoder(nn.Module):
    """Embeddings, mask, positions and a cache as flat tensors → logits and the cache."""

    def __init__(self, size: Size):
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(**size.text, tie_word_embeddings=True))

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> Decoder:
        """Of a model that is there."""
        decoder = cls.__new__(cls)
        nn.Module.__init__(decoder)
        decoder.model = model
        return decoder.eval()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache()
        for key, value in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        done = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return done.logits, [half for one in cache.layers for half in (one.keys, one.values)]

    def example(self, past: int, new: int) -> Example:
        config = self.model.config
        shape = (2, config.num_key_value_heads, past, config.head_dim)
        embeds = torch.zeros(2, new, config.hidden_size)
        mask = torch.ones(2, past + new, dtype=torch.int64)
        positions = torch.arange(past, past + new).expand(2, new).contiguous()
        halves = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
        pasts, presents = (
            [
                f"{kind}.{i}.{half}"
                for i in range(config.num_hidden_layers)
                for half in ("key", "value")
            ]
            for kind in ("past_key_values", "present")
        )
        names = ["inputs_embeds", "attention_mask", "position_ids", *pasts]
        axes = {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": {0: "batch_size", 1: "sequence_length"},
            **{name: {0: "batch_size", 2: "past_sequence_length"} for name in pasts},
        }
        return (embeds, mask, positions, *halves), names, ["logits", *presents], axes

    def dynamic_shapes(self) -> Any:
        auto = Dim.DYNAMIC
        cache = tuple({0: auto, 2: auto} for _ in range(2 * self.model.config.num_hidden_layers))
        return ({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}, cache)


class Tiles(nn.Module):
    """SmolVLM's tower and connector: pixel_values [B, 3, H, W] → image features [B, T, D].

    The positions of the patches are constants: the tower's own code looks them up image by image,
    which no tracer follows.
    """

    def __init__(self, model: Idefics3Model):
        super().__init__()
        self.tower, self.connector = model.vision_model, model.connector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding.weight
        hidden = self.tower.encoder(inputs_embeds=hidden).last_hidden_state
        return self.connector(self.tower.post_layernorm(hidden))


def load_parts(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, LlamaForCausalLM]:
    """Of a workload's folder, what makes features of images, and the language model."""
    llama = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=dtype).eval()
    config = json.loads((folder / "checkpoint/config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "idefics3":
        model = Idefics3ForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=dtype)
        return Tiles(model.model).eval(), llama
    tower = Tower(Size(config["vision_config"], {"hidden_size": llama.config.hidden_size}))
    towers = ("vision_encoder.", "projection.")
    tensors = load_file(folder / "checkpoint/model.safetensors")
    state = {
        name.replace("vision_encoder.", "encoder.", 1).replace(".projection.", ".", 1): tensor
        for name, tensor in tensors.items()
        if name.startswith(towers) and not name.startswith("vision_encoder.head.")
    }
    expected = {name.replace(".vision_model.", ".", 1): name for name in tower.state_dict()}
    tower.load_state_dict({expected[name]: tensor for name, tensor in state.items()})
    return tower.to(dtype).eval(), llama
