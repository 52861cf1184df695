"""A Llama checkpoint as a bundle that takes text only, and the same model in numpy float64."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.graph.running import InMemory
from tests.runtime import toy
from vlmport.bundle import Bundle, CacheLayout, Dims, GenerationSpec, Variant
from vlmport.exporter.assign import Assignment
from vlmport.graph.builder import GraphBuilder, to_model
from vlmport.graph.decoder import DecoderConfig, decoder_graph, embed_graph

EMBEDDING = "model.embed_tokens.weight"


def write_llama_bundle(
    folder: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    tokenizer: Path | None = None,
) -> Bundle:
    """The toy bundle with its decoder, embedding and tokenizer exchanged."""
    bundle = toy.write_bundle(folder)
    config = DecoderConfig.read(raw, "config.json")
    head = tensors[EMBEDDING if config.tie_word_embeddings else "lm_head.weight"]
    rest = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    save(decoder_graph(config), {**rest, "lm_head.weight": head}, folder / "onnx/llama.onnx")
    save(embed_graph(config), {EMBEDDING: tensors[EMBEDDING]}, folder / "onnx/embed.onnx")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    manifest = bundle.manifest
    components = {
        **manifest.components,
        "decoder_model_merged": {"fp32": Variant("onnx/llama.onnx")},
        "embed_tokens": {"fp32": Variant("onnx/embed.onnx")},
    }
    dims = Dims(
        config.hidden_size,
        config.num_hidden_layers,
        config.kv_heads,
        config.head_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
    generation = GenerationSpec((raw.get("eos_token_id", 0),), 0, 256, False, {})
    return Bundle(
        folder,
        dataclasses.replace(
            manifest,
            components=components,
            dims=dims,
            cache=CacheLayout(),
            generation=generation,
        ),
    )


def save(builder: GraphBuilder, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a graph whose weights are exactly these."""
    assignment = Assignment({name: InMemory(name, array) for name, array in tensors.items()})
    assignment.assign(builder.graph, lambda count: None)
    assignment.finish(lambda key: False)
    ir.save(to_model(builder), path)


def random_tensors(raw: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights at which the greedy text is no constant."""
    rng = np.random.default_rng(seed)
    D, inner = raw["hidden_size"], raw["intermediate_size"]
    head_dim = D // raw["num_attention_heads"]
    keys = raw["num_key_value_heads"] * head_dim
    shapes = {EMBEDDING: (raw["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(raw["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, width in (("q_proj", D), ("k_proj", keys), ("v_proj", keys), ("o_proj", D)):
            shapes[f"{at}self_attn.{name}.weight"] = (width, D)
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, D) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (D, inner)}
        shapes |= {f"{at}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    return {
        name: (
            rng.standard_normal(shape) * (1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.1)
            + (len(shape) == 1)
        ).astype("f4")
        for name, shape in shapes.items()
    }


def llama_logits(
    raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], ids: list[int]
) -> np.ndarray:
    """Logits f64[S, V] of a whole text. Source: transformers 5.23, modeling_llama.py."""
    w = {name: tensor.astype("f8") for name, tensor in tensors.items()}
    D, heads, kv_heads = (
        raw[f"{n}"] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    size, S = D // heads, len(ids)
    angle = np.arange(S)[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + raw["rms_norm_eps"]) * w[name]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w[EMBEDDING][ids]
    for i in range(raw["num_hidden_layers"]):
        at = f"model.layers.{i}."
        y = norm(x, f"{at}input_layernorm.weight")
        q, k, v = ((y @ w[f"{at}self_attn.{n}_proj.weight"].T).reshape(S, -1, size) for n in "qkv")
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (rotate(k), v))
        scores = np.einsum("shd,thd->hst", rotate(q), k) / size**0.5
        scores = np.exp(np.where(np.tril(np.ones((S, S))) > 0, scores, -np.inf))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hst,thd->shd", scores, v).reshape(S, -1)
        x = x + mixed @ w[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, f"{at}post_attention_layernorm.weight")
        gate, up = (y @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w[EMBEDDING].T
