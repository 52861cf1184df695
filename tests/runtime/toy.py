"""A bundle written by hand, of a family that no exporter knows.

It is unlike the real families where a runtime might guess: the vision encoder's input has another
name, the number of image tokens follows the picture's size, a picture's ids begin and end with
markers, features have three axes. Its decoder is computed a second time in numpy float64.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from tokenizers import Tokenizer

from tests.checkpoints import write_json, write_tokenizer
from tests.runtime.toy_decoder import (
    CACHE,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    THETA,
    VOCAB,
    decoder,
    model,
    value,
)
from vlmport.bundle import (
    Bundle,
    Dims,
    GenerationSpec,
    Golden,
    GoldenImage,
    Manifest,
    PixelSpec,
    PromptSpec,
    Variant,
    hash_folder,
    write_manifest,
)

IMAGE, START, END = VOCAB, VOCAB + 1, VOCAB + 2  # the head knows the ids below
PATCH = 4
FIXED = ("image_processor", "position_ids")
CONTEXT = 200
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:"
    "{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Weights:
    """Random weights of the toy decoder and embedding."""

    tensors: Mapping[str, np.ndarray]

    @classmethod
    def random(cls, seed: int = 0) -> Weights:
        rng = np.random.default_rng(seed)
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes = {"embed": (VOCAB + 3, HIDDEN), "head": (HIDDEN, VOCAB), "vision": (48, HIDDEN)}
        for i in range(LAYERS):
            shapes |= {f"q{i}": (HIDDEN, queries), f"k{i}": (HIDDEN, keys)}
            shapes |= {f"v{i}": (HIDDEN, keys), f"o{i}": (queries, HIDDEN)}
            shapes |= {f"up{i}": (HIDDEN, 40), f"down{i}": (40, HIDDEN)}
        scale = {"embed": 1.0, "vision": 0.5}
        return cls(
            {
                name: (rng.standard_normal(shape) * scale.get(name, 1.6 / shape[0] ** 0.5)).astype(
                    "f4"
                )
                for name, shape in shapes.items()
            }
        )

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]


def reference_logits(
    weights: Weights, embeds: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """All logits [S, V] of one row, in float64, without a cache."""
    x = embeds.astype("f8")
    S = len(x)
    where = np.arange(S) if positions is None else positions
    angle = where[:, None] / THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def heads(y: np.ndarray, rotate: bool) -> np.ndarray:
        y = y.reshape(S, -1, HEAD_DIM)
        if not rotate:
            return y
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for i in range(LAYERS):
        w = {n: weights[f"{n}{i}"].astype("f8") for n in ("q", "k", "v", "o", "up", "down")}
        q, k, v = heads(x @ w["q"], True), heads(x @ w["k"], True), heads(x @ w["v"], False)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("shd,thd->hst", q, k) / HEAD_DIM**0.5
        scores = np.where(np.tril(np.ones((S, S))) > 0, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hst,thd->shd", scores, v).reshape(S, -1) @ w["o"]
        x = x + np.tanh(x @ w["up"]) @ w["down"]
    return x @ weights["head"].astype("f8")


def reference_greedy(weights: Weights, embeds: np.ndarray, steps: int) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    tokens: list[int] = []
    for _ in range(steps):
        tokens.append(int(reference_logits(weights, embeds)[-1].argmax()))
        embeds = np.concatenate([embeds, weights["embed"][tokens[-1:]]])
    return tokens


def write_bundle(
    folder: Path,
    *,
    seed: int = 0,
    context: int = CONTEXT,
    stop: Sequence[int] = (0,),
    max_new_tokens: int = 12,
    positions_rank: int = 2,
    cache_dtype: int = T.FLOAT,
) -> Bundle:
    """Write the toy bundle."""
    weights = Weights.random(seed)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    models = {
        "image_processor": image_processor(),
        "vision_encoder": vision_encoder(weights),
        "embed_tokens": embed_tokens(weights),
        "decoder_model_merged": decoder(weights.tensors, positions_rank, cache_dtype),
    }
    if positions_rank == 3:
        models["position_ids"] = position_ids()
    for name, graph in models.items():
        onnx.checker.check_model(graph)
        onnx.save(graph, folder / "onnx" / f"{name}.onnx")
    write_tokenizer(folder, VOCAB)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>", "<start>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE})
    one = {name: {"any": Variant(f"onnx/{name}.onnx")} for name in FIXED if name in models}
    rest = {name: {"fp32": Variant(f"onnx/{name}.onnx")} for name in models if name not in one}
    manifest = Manifest(
        producer="test",
        name="toy",
        family="none that anyone knows",
        components={**one, **rest},
        auto={"cpu": dict.fromkeys(rest, "fp32")},
        files=hash_folder(folder),
        dims=Dims(HIDDEN, LAYERS, KV_HEADS, HEAD_DIM, VOCAB, context),
        cache=CACHE,
        prompt=PromptSpec(
            "<image>", IMAGE, IMAGE, ({"role": "user", "content": [{"type": "image"}]},)
        ),
        generation=GenerationSpec(tuple(stop), 0, max_new_tokens, False, {}),
        pixels=PixelSpec("bicubic", "nothing"),
        golden=golden(),
    )
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def golden() -> Golden:
    pixels = np.random.default_rng(5).integers(0, 256, (12, 16, 3), np.uint8)
    image = GoldenImage(16, 12, base64.b64encode(pixels.tobytes()).decode())
    return Golden(image, 5, 5 * 14, {})


def picture(seed: int = 0, height: int = 12, width: int = 16) -> np.ndarray:
    """Random pixels; (height // 4) · (width // 4) image tokens."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def image_processor() -> onnx.ModelProto:
    """image → `patches` f32[N, 48] of 4x4 pixels, scaled by the option `gain`."""
    nodes = [
        h.make_node("Shape", ["image"], ["hwc"]),
        h.make_node("Div", ["hwc", "patch"], ["cells3"]),
        h.make_node("Slice", ["cells3", "zero", "two"], ["cells"]),
        h.make_node("Mul", ["cells", "four"], ["even"]),
        h.make_node("Slice", ["image", "zeros", "even", "axes"], ["cut"]),
        h.make_node("Slice", ["cells", "zero", "one"], ["rows"]),
        h.make_node("Slice", ["cells", "one", "two"], ["columns"]),
        h.make_node("Concat", ["rows", "four", "columns", "four", "three"], ["grid"], axis=0),
        h.make_node("Reshape", ["cut", "grid"], ["tiled"]),
        h.make_node("Transpose", ["tiled"], ["turned"], perm=[0, 2, 1, 3, 4]),
        h.make_node("Reshape", ["turned", "flat"], ["bytes"]),
        h.make_node("Cast", ["bytes"], ["floats"], to=T.FLOAT),
        h.make_node("Div", ["floats", "white"], ["unit"]),
        h.make_node("Mul", ["unit", "gain"], ["patches"]),
        h.make_node("ReduceProd", ["cells"], ["count"], keepdims=1),
        h.make_node("Expand", ["image_id", "count"], ["inner"]),
        h.make_node("Concat", ["start_id", "inner", "end_id"], ["prompt_ids"], axis=0),
    ]
    constants = {
        "patch": np.array([PATCH, PATCH, 3]),
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "three": np.array([3]),
        "four": np.array([PATCH]),
        "zeros": np.array([0, 0]),
        "axes": np.array([0, 1]),
        "flat": np.array([-1, 48]),
        "white": np.array(255, "f4"),
        "gain": np.array(1, "f4"),
        "image_id": np.array([IMAGE]),
        "start_id": np.array([START]),
        "end_id": np.array([END]),
    }
    inputs = [value("image", T.UINT8, ["height", "width", 3]), value("gain", T.FLOAT, [])]
    outputs = [
        value("patches", T.FLOAT, ["num_patches", 48]),
        value("prompt_ids", T.INT64, ["num_ids"]),
    ]
    return model(nodes, inputs, outputs, constants)


def vision_encoder(weights: Weights) -> onnx.ModelProto:
    nodes = [
        h.make_node("MatMul", ["patches", "vision"], ["flat"]),
        h.make_node("Unsqueeze", ["flat", "first"], ["image_features"]),
    ]
    return model(
        nodes,
        [value("patches", T.FLOAT, ["num_patches", 48])],
        [value("image_features", T.FLOAT, [1, "num_patches", HIDDEN])],
        {"vision": weights["vision"], "first": np.array([0])},
    )


def embed_tokens(weights: Weights) -> onnx.ModelProto:
    dims = ["batch_size", "sequence_length"]
    return model(
        [h.make_node("Gather", ["embed", "input_ids"], ["inputs_embeds"])],
        [value("input_ids", T.INT64, dims)],
        [value("inputs_embeds", T.FLOAT, [*dims, HIDDEN])],
        {"embed": weights["embed"]},
    )


def position_ids() -> onnx.ModelProto:
    """All tokens of a picture stand where the text after it begins. No mask is asked for."""
    nodes = [
        h.make_node("Equal", ["input_ids", "image_id"], ["is_image"]),
        h.make_node("Where", ["is_image", "zero", "one"], ["steps"]),
        h.make_node("CumSum", ["steps", "one"], ["before"], exclusive=1),
        h.make_node("Shape", ["input_ids"], ["shape"]),
        h.make_node("Concat", ["three", "shape"], ["shape3"], axis=0),
        h.make_node("Expand", ["before", "shape3"], ["position_ids"]),
        h.make_node("ReduceSum", ["steps", "axis"], ["text"], keepdims=1),
        h.make_node("Slice", ["shape", "axis", "two"], ["count"]),
        h.make_node("Sub", ["text", "count"], ["rope_delta"]),
    ]
    dims = ["batch_size", "sequence_length"]
    constants = {
        "image_id": np.array(IMAGE),
        "zero": np.array(0),
        "one": np.array(1),
        "axis": np.array([1]),
        "two": np.array([2]),
        "three": np.array([3]),
    }
    outputs = [
        value("position_ids", T.INT64, [3, *dims]),
        value("rope_delta", T.INT64, ["batch_size", 1]),
    ]
    return model(nodes, [value("input_ids", T.INT64, dims)], outputs, constants)
