"""Tiny random checkpoints in the real file formats, for every test that needs one.

`write_prefix_checkpoint` writes a distilvit2 folder (`prefix_conditioning_vlm`): config.json,
safetensors and tokenizer files. Every tensor has its real name and a value that depends on the
seed and on its plain name only, so that two spellings of one model hold the same numbers.
No torch: numpy, ml_dtypes, safetensors and tokenizers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

DTYPES = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
END_OF_TEXT = "<|endoftext|>"
WORDS = ("Ġa", "Ġt", "he", "in", "Ġs", "re", "on", "ed", "Ġw", "nd", "Ġthe", "Ġb", "ar", "qu")

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "_name_or_path": "google/siglip-base-patch16-224",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 30,
    "patch_size": 6,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": True,
}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "_name_or_path": "HuggingFaceTB/SmolLM-135M",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 113,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROPE = {
    "v4": {"rope_theta": 10000.0, "rope_scaling": None},
    "v5": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
}
CONFIG: dict[str, Any] = {
    "model_type": "prefix_conditioning_vlm",
    "architectures": ["PrefixConditioningVLM"],
    "projection_dim": 512,
    "mlp_hidden_dim": 40,
    "freeze_vision_encoder": True,
    "vision_unfreeze_layers": 0,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": None,
    "max_length": 30,
}


def write_prefix_checkpoint(
    folder: str | Path,
    *,
    spelling: Literal["v4", "v5"] = "v4",
    projection: Literal["linear", "mlp"] = "linear",
    dtype: Literal["F32", "F16", "BF16"] = "F32",
    shards: int = 1,
    module_prefix: bool = False,
    seed: int = 0,
    lora: bool | Literal["fresh"] = True,
    tokenizer: bool = True,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny distilvit2 checkpoint and return its folder.

    Args:
        spelling: how transformers 4 (`vision_encoder.vision_model.…`, `torch_dtype`) or
            transformers 5 (no `vision_model` level, `dtype`) saves the same model.
        projection: "linear" is one layer, "mlp" two with a GELU between.
        dtype: the stored type of every tensor.
        shards: 1 writes model.safetensors, more write shards and their index.
        module_prefix: put DataParallel's `module.` before every name.
        lora: True writes pairs with B != 0 under PEFT's names; "fresh" the same with B = 0, as
            distilvit2's `-merged` folders have it; False a plain language model.
        vision, text, config: keys that replace or add to VISION, TEXT and CONFIG.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = prefix_config(spelling, projection, dtype, vision, text, config)
    tensors = prefix_tensors(settings, spelling=spelling, seed=seed, lora=lora)
    if module_prefix:
        tensors = {f"module.{name}": value for name, value in tensors.items()}
    write_json(folder / "config.json", settings)
    write_weights(folder, tensors, dtype=dtype, shards=shards)
    if tokenizer:
        write_tokenizer(folder, settings["text_config"]["vocab_size"])
    return folder


def prefix_config(
    spelling: str,
    projection: str,
    dtype: str,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of that checkpoint."""
    dtype_key = "torch_dtype" if spelling == "v4" else "dtype"
    tail = {
        dtype_key: TORCH_NAMES[dtype],
        "transformers_version": "4.56.2" if spelling == "v4" else "5.23.0",
    }
    return {
        **CONFIG,
        "projection_type": projection,
        "vision_config": {**VISION, dtype_key: TORCH_NAMES[dtype], **(vision or {})},
        "text_config": {**TEXT, **ROPE[spelling], dtype_key: TORCH_NAMES[dtype], **(text or {})},
        **tail,
        **(config or {}),
    }


def prefix_tensors(
    config: Mapping[str, Any], *, spelling: str, seed: int = 0, lora: bool | str = True
) -> dict[str, np.ndarray]:
    """All tensors, float32, under the names that the checkpoint stores."""
    vision, text = config["vision_config"], config["text_config"]
    tower = "vision_encoder.vision_model." if spelling == "v4" else "vision_encoder."
    model = "language_model.base_model.model." if lora else "language_model."
    tensors: dict[str, np.ndarray] = {}
    for name, shape in siglip_shapes(vision).items():
        tensors[tower + name] = values("vision_encoder." + name, shape, seed)
    for name, shape in projection_shapes(config).items():
        tensors[name] = values(name, shape, seed)
    for name, shape in llama_shapes(text).items():
        module, _, leaf = name.rpartition(".")
        target = bool(lora) and module.rpartition(".")[2] in lora_targets(config)
        stored = f"{model}{module}.base_layer.{leaf}" if target else model + name
        tensors[stored] = values("language_model." + name, shape, seed)
        if target and leaf == "weight":
            r = config["lora_r"]
            a = values(f"language_model.{module}.lora_A", (r, shape[1]), seed)
            b = values(f"language_model.{module}.lora_B", (shape[0], r), seed)
            tensors[f"{model}{module}.lora_A.default.weight"] = a
            tensors[f"{model}{module}.lora_B.default.weight"] = b * (lora != "fresh")
    return tensors


def lora_targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that distilvit2 adapts; null in config.json means those of a llama."""
    return tuple(config["lora_target_modules"] or LORA_TARGETS)


def siglip_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a SiglipVisionModel as transformers 5 spells it, with its pooling head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    patch, channels = config["patch_size"], config["num_channels"]
    patches = (config["image_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (hidden, channels, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": (patches, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{layer}."
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{at}self_attn.{proj}", hidden, hidden)
        shapes |= _norm(at + "layer_norm1", hidden) | _norm(at + "layer_norm2", hidden)
        shapes |= _linear(at + "mlp.fc1", hidden, inner) | _linear(at + "mlp.fc2", inner, hidden)
    shapes |= _norm("post_layernorm", hidden)
    if config.get("vision_use_head", True):
        shapes["head.probe"] = (1, 1, hidden)
        shapes["head.attention.in_proj_weight"] = (3 * hidden, hidden)
        shapes["head.attention.in_proj_bias"] = (3 * hidden,)
        shapes |= _linear("head.attention.out_proj", hidden, hidden)
        shapes |= _norm("head.layernorm", hidden)
        shapes |= _linear("head.mlp.fc1", hidden, inner) | _linear("head.mlp.fc2", inner, hidden)
    return shapes


def projection_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the projection from the tower's width to the decoder's."""
    width, hidden = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    if config["projection_type"] == "linear":
        return _linear("projection.projection", width, hidden)
    inner = config["mlp_hidden_dim"]
    first = _linear("projection.projection.0", width, inner)
    return first | _linear("projection.projection.3", inner, hidden)


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a LlamaForCausalLM; a tied head is left out, as safetensors does."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for proj, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes |= _linear(f"{at}self_attn.{proj}", hidden, width, bias=bias)
        shapes |= _linear(at + "self_attn.o_proj", queries, hidden, bias=bias)
        for proj in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{at}mlp.{proj}", hidden, inner, bias=mlp_bias)
        shapes |= _linear(at + "mlp.down_proj", inner, hidden, bias=mlp_bias)
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], *, dtype: str = "F32", shards: int = 1
) -> None:
    """model.safetensors, or `shards` files and model.safetensors.index.json."""
    cast = {name: np.ascontiguousarray(t, dtype=DTYPES[dtype]) for name, t in tensors.items()}
    if shards == 1:
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: cast[name] for name in list(cast)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in cast.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, vocab_size: int = 113) -> None:
    """A byte-level BPE after SmolLM's: digits apart, `<|endoftext|>` is id 0 and all specials.

    First come the 97 entries that printable ASCII and newlines need, then the merges of WORDS,
    then the other bytes (271 in all), as many as `vocab_size` has room for.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokens, merges = [END_OF_TEXT, *printable], []
    for word in WORDS[: max(0, vocab_size - len(tokens))]:
        tokens.append(word)
        merges.append((word[:-1], word[-1]) if word != "Ġthe" else ("Ġt", "he"))
    tokens += [char for char in alphabet if char not in tokens][: vocab_size - len(tokens)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    write_json(folder / "special_tokens_map.json", specials)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048, **specials}
    settings |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    settings["added_tokens_decoder"] = {"0": {"content": END_OF_TEXT, "special": True}}
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _linear(
    name: str, features: int, width: int, *, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (width, features)}
    return shapes | ({f"{name}.bias": (width,)} if bias else {})


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random values of a size at which every tensor shows in the outputs."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, "f4")
    module, _, leaf = name.rpartition(".")
    if "norm" in module and leaf == "weight":
        return np.float32(1) + np.float32(0.1) * noise
    if "embed_tokens" in module or len(shape) == 1:
        return noise * np.float32(0.3)
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))
