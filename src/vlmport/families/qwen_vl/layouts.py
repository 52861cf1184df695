"""Qwen's vision-language models as two graphs for images of one size, and for onnxruntime-genai.

Sources: CodeGandee/auto-quantize-model, whose inputs and outputs `fused` has; onnxruntime-genai
0.18, its test models' genai_config.json and the code that reads it (multi_modal.cpp,
qwen_vl_position_inputs.cpp), for `genai`.

Traps of onnxruntime-genai:
- `hidden_size` is how wide it makes the embeddings, so DeepStack's lanes count.
- A decoder whose logits have one row gives those of the last token alone. With one row for each
  token, a prompt of 4,000 tokens takes 2.5 GB of them.
- It masks every token of a prompt that has the id `pad_token_id`, so no prompt may hold that id.
  It pads with it where one row of a batch has ended, so it is best one of the embedding's rows.
- With a shared buffer the cache has room for `max_length` tokens from the start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from vlmport.bundle.layouts import ImageSize
from vlmport.errors import ExportError
from vlmport.families.base import HubFiles, Layout, SizedLayout
from vlmport.families.qwen_vl.fused_decoder import text_with_image_graph
from vlmport.families.qwen_vl.merged_embedding import merged_embedding_graph
from vlmport.graph.builder import GraphBuilder, add_output, new_graph, to_float32
from vlmport.graph.decoder import decoder_graph
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.image import fixed_size_processor
from vlmport.graph.parameters import Format

if TYPE_CHECKING:
    from vlmport.families.qwen_vl.family import QwenVL

FLOAT = ir.DataType.FLOAT
DEFAULT_SIZE = ImageSize(672, 672)
FUSED_ROOM = 16  # tokens of the context besides an image's: the template's, and an answer's
GENAI_ROOM = 4096  # tokens: what its cache takes memory for, unless its user says otherwise
# Names of Pillow's filters in onnxruntime-extensions, by their codes.
FILTERS = {1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def fused(family: QwenVL) -> SizedLayout:
    """The layout `fused`."""
    return SizedLayout(DEFAULT_SIZE, lambda size: _fused_at(family, size))


def _fused_at(family: QwenVL, size: ImageSize) -> Layout:
    """Make the layout. Raises ExportError for a size of no whole number of tokens, or too large."""
    pixels = family.pixel_config
    grid = _grid(family, size)
    tokens, token = math.prod(grid) // pixels.merge_size**2, family.config.image_token_id
    if tokens + FUSED_ROOM > family.text.max_position_embeddings:
        raise ExportError(
            f"image size {size}: {tokens} tokens, the context has "
            f"{family.text.max_position_embeddings}, of which a question needs some",
            hint="choose a smaller size",
            code="layout.wrong-image-size",
        )
    return Layout(
        fixed_graphs=lambda: {
            "image_processor": fixed_size_processor(size.height, size.width, pixels)
        },
        graphs=lambda precision: {
            "vision": _vision(family, size, precision.vision),
            "text_with_image": text_with_image_graph(
                family.text, "", precision, token, grid, pixels.merge_size
            ),
        },
        hub_files=family.hub_files,
        paths={
            "image_processor": "image_processor.onnx",
            "vision": f"vision_{size}{{suffix}}.onnx",
            "text_with_image": "text_with_image{suffix}.onnx",
        },
        image_tokens=tokens,
    )


def _grid(family: QwenVL, size: ImageSize) -> tuple[int, int]:
    """Return rows and columns of patches. Raises ExportError if a token would be cut."""
    patching = family.pixel_config.patching
    factor = patching.factor
    if size.width % factor or size.height % factor:
        width, height = (max(1, round(s / factor)) * factor for s in (size.width, size.height))
        raise ExportError(
            f"image size {size}: both sides must be multiples of {factor}, the side of one token",
            hint=f"such as {ImageSize(width, height)}",
            code="layout.wrong-image-size",
        )
    return size.height // patching.size, size.width // patching.size


def _vision(family: QwenVL, size: ImageSize, form: Format) -> GraphBuilder:
    """pixel_values f32[1, 3, height, width] → vision_features f32[T, D·(1+n)]."""
    builder = new_graph("vision")
    op, patching, grid = builder.op, family.pixel_config.patching, _grid(family, size)
    pixels = builder.input("pixel_values", FLOAT, [1, 3, size.height, size.width])
    image = op.Transpose(op.Squeeze(pixels, [0]), perm=[1, 2, 0])
    rows = patching.rows(op, patching.cut(op, image))
    grids = op.Reshape(op.Constant(value_ints=[1, *grid]), [1, 3])
    features = to_float32(op, family.vision_tower(form)(op, rows, grids), form.dtype)
    tokens = math.prod(grid) // patching.merge**2
    add_output(builder, features, "vision_features", FLOAT, [tokens, family.text.embeds_size])
    return builder


def genai(family: QwenVL) -> Layout:
    """The layout `genai`; its client does not open image_processor and position_ids."""
    text = family.text
    return Layout(
        fixed_graphs=family.fixed_graphs,
        graphs=lambda precision: {
            "vision": family.vision_encoder(precision.vision),
            "embedding": merged_embedding_graph(
                text, "", precision.embed, family.config.image_token_id
            ),
            "decoder": decoder_graph(text, "", precision.decoder, precision.head, last_only=True),
        },
        hub_files=lambda: _genai_files(family),
        paths={
            **{name: f"{name}.onnx" for name in ("image_processor", "position_ids")},
            "vision": "vision{suffix}.onnx",
            "embedding": "embedding{suffix}.onnx",
            "decoder": "model{suffix}.onnx",
        },
        client_files=lambda files: {"genai_config.json": genai_config(family, files)},
    )


def _genai_files(family: QwenVL) -> HubFiles:
    """Return the family's files, with onnxruntime-extensions' processor for Hugging Face's."""
    pixels = family.pixel_config
    name = f"{family.name}_image_processor"
    sizes = {
        "smart_resize": 1,
        "min_pixels": pixels.min_pixels,
        "max_pixels": pixels.max_pixels,
        "patch_size": pixels.patch_size,
        "merge_size": pixels.merge_size,
    }
    patches = {
        "patch_size": pixels.patch_size,
        "temporal_patch_size": pixels.temporal_patch_size,
        "merge_size": pixels.merge_size,
    }
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        # It ignores width and height when it chooses them itself.
        (
            "resize",
            "Resize",
            {"interpolation": FILTERS[pixels.resample], "width": 1, "height": 1, **sizes},
        ),
        ("rescale", "Rescale", {"rescale_factor": pixels.rescale_factor}),
        (
            "normalize",
            "Normalize",
            {"mean": list(pixels.image_mean), "std": list(pixels.image_std), family.name: 1},
        ),
        ("patch_image", "PatchImage", patches),
    ]
    transforms = [
        {"operation": {"name": step, "type": kind, **({"attrs": attrs} if attrs else {})}}
        for step, kind, attrs in steps
    ]
    processor = {"processor": {"name": name, "transforms": transforms}}
    return dataclasses.replace(family.hub_files(), processor_config=processor)


def genai_config(family: QwenVL, files: Mapping[str, str]) -> dict[str, Any]:
    """Make genai_config.json: sizes, names of inputs and outputs, and which graphs to open.

    Args:
        files: component → the graph's path.
    """
    return {"model": _genai_model(family, files), "search": _genai_search(family)}


def _genai_model(family: QwenVL, files: Mapping[str, str]) -> dict[str, Any]:
    text, config, generation = family.text, family.config, family.generation
    return {
        "type": family.name,
        "bos_token_id": generation.pad_token_id,  # it must have one; nothing adds it
        "eos_token_id": list(generation.stop_token_ids),
        "pad_token_id": family.unused_token_id,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "decoder": _genai_decoder(text, files["decoder"]),
        "embedding": {
            "filename": files["embedding"],
            "session_options": _session(),
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": files["vision"],
            "config_filename": "processor_config.json",
            "patch_size": family.vision.patch_size,
            "spatial_merge_size": family.vision.spatial_merge_size,
            "session_options": _session(),
            "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
            "outputs": {"image_features": "image_features"},
        },
    }


def _genai_decoder(text: DecoderConfig, file: str) -> dict[str, Any]:
    past, present = "past_key_values.%d", "present.%d"
    return {
        "filename": file,
        "head_size": text.head_size,
        "hidden_size": text.embeds_size,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.kv_heads,
        "session_options": _session(),
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": f"{past}.key",
            "past_value_names": f"{past}.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{present}.key",
            "present_value_names": f"{present}.value",
        },
    }


def _genai_search(family: QwenVL) -> dict[str, Any]:
    wanted = family.generation.defaults or {}
    return {
        "do_sample": False,
        **{name: wanted[name] for name in SEARCH if wanted.get(name) is not None},
        "max_length": min(GENAI_ROOM, family.text.max_position_embeddings),
        "num_beams": 1,
        "past_present_share_buffer": True,
    }


def _session() -> dict[str, Any]:
    return {"provider_options": []}
