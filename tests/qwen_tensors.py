"""Every tensor of Qwen2.5-VL and Qwen3-VL, with its shape and random values.

The plain names are `visual.*`, `model.*` and `lm_head.*`, as transformers 4 saves Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from tests.checkpoints import values

Names = Literal["visual", "model.visual"]
Settings = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def named(tensors: Mapping[str, np.ndarray], names: Names) -> dict[str, np.ndarray]:
    """Under the names of a spelling; the plain ones are `visual.*`, `model.*` and `lm_head.*`."""
    if names == "visual":
        return dict(tensors)
    full = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
    heads = {name: name.partition(".")[0] for name in tensors}
    return {full[head] + name.removeprefix(head): tensors[name] for name, head in heads.items()}


def tensors_of(kind: str, vision: Settings, text: Settings, seed: int) -> dict[str, np.ndarray]:
    """All tensors, float32, by plain name; a tied head is left out, as safetensors does."""
    tower = qwen2_5_vision_shapes if kind == "qwen2_5_vl" else qwen3_vision_shapes
    shapes = {f"visual.{name}": shape for name, shape in tower(vision).items()}
    shapes |= text_shapes(text, qwen3=kind == "qwen3_vl")
    # A norm and a table of positions get values of their size by what they are called.
    aliases = {"ln_q.": "ln_q_norm.", "pos_embed.": "pos_embed_tokens."}
    tensors = {}
    for name, shape in shapes.items():
        known = name
        for part, alias in aliases.items():
            known = known.replace(part, alias)
        tensors[name] = values(known, shape, seed)
    return tensors


def qwen2_5_vision_shapes(config: Settings) -> Shapes:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    wide = hidden * config["spatial_merge_size"] ** 2
    volume = (3, config["temporal_patch_size"], patch, patch)
    shapes: Shapes = {"patch_embed.proj.weight": (hidden, *volume)}
    for block in range(config["depth"]):
        at = f"blocks.{block}."
        shapes |= {f"{at}norm1.weight": (hidden,), f"{at}norm2.weight": (hidden,)}
        shapes |= _linear(f"{at}attn.qkv", hidden, 3 * hidden)
        shapes |= _linear(f"{at}attn.proj", hidden, hidden)
        shapes |= _linear(f"{at}mlp.gate_proj", hidden, inner)
        shapes |= _linear(f"{at}mlp.up_proj", hidden, inner)
        shapes |= _linear(f"{at}mlp.down_proj", inner, hidden)
    shapes["merger.ln_q.weight"] = (hidden,)
    shapes |= _linear("merger.mlp.0", wide, wide)
    return shapes | _linear("merger.mlp.2", wide, config["out_hidden_size"])


def qwen3_vision_shapes(config: Settings) -> Shapes:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    wide = hidden * config["spatial_merge_size"] ** 2
    volume = (config["in_channels"], config["temporal_patch_size"], patch, patch)
    shapes: Shapes = {
        "patch_embed.proj.weight": (hidden, *volume),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (config["num_position_embeddings"], hidden),
    }
    for block in range(config["depth"]):
        at = f"blocks.{block}."
        shapes |= _norm(f"{at}norm1", hidden) | _norm(f"{at}norm2", hidden)
        shapes |= _linear(f"{at}attn.qkv", hidden, 3 * hidden)
        shapes |= _linear(f"{at}attn.proj", hidden, hidden)
        shapes |= _linear(f"{at}mlp.linear_fc1", hidden, inner)
        shapes |= _linear(f"{at}mlp.linear_fc2", inner, hidden)
    lanes = range(len(config["deepstack_visual_indexes"]))
    for merger in ("merger", *(f"deepstack_merger_list.{lane}" for lane in lanes)):
        shapes |= _norm(f"{merger}.norm", hidden if merger == "merger" else wide)
        shapes |= _linear(f"{merger}.linear_fc1", wide, wide)
        shapes |= _linear(f"{merger}.linear_fc2", wide, config["out_hidden_size"])
    return shapes


def text_shapes(config: Settings, *, qwen3: bool) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    bias = config.get("attention_bias", False)
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for proj, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes |= _linear(f"{at}self_attn.{proj}", hidden, width, bias=bias or not qwen3)
        shapes |= _linear(f"{at}self_attn.o_proj", queries, hidden, bias=bias)
        if qwen3:
            shapes |= {f"{at}self_attn.{norm}_norm.weight": (size,) for norm in "qk"}
        for proj in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{at}mlp.{proj}", hidden, inner, bias=False)
        shapes |= _linear(f"{at}mlp.down_proj", inner, hidden, bias=False)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _linear(name: str, features: int, width: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (width, features)}
    return shapes | ({f"{name}.bias": (width,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
