"""Idefics3, SmolVLM: SigLIP over the tiles of an image, a pixel shuffle, and a Llama decoder.

Source: transformers 5.23, modeling_idefics3.py and configuration_idefics3.py; SmolVLM has the same
under other names, video aside.

Traps:
- The position of a patch is looked up in buckets of float32 fractions, which are not the identity
  for 19, 25, 29, 31, 38 and other numbers of patches a side: see bucketed_positions.py.
- Tiles are `max_image_size` large, whatever the tower's own `image_size` is.
- Only the outer config decides whether the head is tied; text_config's tie_word_embeddings is
  ignored. If text_config is absent, its norm's epsilon is 1e-5, not a Llama's 1e-6.
- An adapter for q_proj, k_proj and v_proj also changes the vision tower, whose layers have these
  names.
- The stop token is in four places that disagree. Those of generation_config.json, of the tokenizer
  and of the chat template are all stop tokens; the decoder's is one if the first is absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from vlmport.checkpoint import Checkpoint, LazyTensor, Size, merged, read_config, subsection
from vlmport.errors import ConfigError, WeightError
from vlmport.families.answering import (
    CONFIG,
    IMAGE_TOKEN_ID,
    AnsweringConfig,
    AnsweringFamily,
    answer_settings,
    listed,
)
from vlmport.families.base import Graphs
from vlmport.families.idefics3.bucketed_positions import PickedRows, bucketed_positions
from vlmport.families.idefics3.pixel_shuffle import Connector
from vlmport.families.idefics3.tile_tokens import IMAGE_TOKEN, tile_tokens
from vlmport.families.idefics3.tiling import TileTokens, Tiling
from vlmport.families.processor_config import PREPROCESSOR, PROCESSOR, read_image_processor
from vlmport.families.templates import read_chat_template
from vlmport.graph.builder import GraphBuilder, add_output, new_graph, to_float32
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.image import image_input, normalized_planes
from vlmport.graph.parameters import Format
from vlmport.graph.pillow_resize import Resample
from vlmport.graph.siglip import SiglipVisionConfig, SiglipVisionTower
from vlmport.text.tokenizer import read_tokenizer

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
POSITIONS = "model.vision_model.embeddings.position_embedding.weight"
SPLITTING = "do_image_splitting"


@dataclass(frozen=True)
class Idefics3Config(AnsweringConfig):
    """The keys of config.json other than its two sub-configs, with Hugging Face's defaults."""

    image_token_id: int = 128257
    scale_factor: Size = 2


@dataclass(frozen=True)
class Idefics3VisionConfig(SiglipVisionConfig):
    """SigLIP's, with the defaults of Idefics3VisionConfig."""

    hidden_size: Size = 1152
    num_attention_heads: Size = 16
    patch_size: Size = 32
    vision_use_head: bool = False


@dataclass(frozen=True)
class Edge:
    """A size given by the longer side."""

    longest_edge: Size


@dataclass(frozen=True)
class PixelConfig:
    """preprocessor_config.json, with the defaults of Idefics3ImageProcessor."""

    size: Edge = Edge(4 * 364)
    max_image_size: Edge = Edge(364)
    do_image_splitting: bool = True
    resample: int = 1  # Pillow's code of Lanczos
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_pad": (True,),
        "resample": (1, 2, 3),
    }

    @property
    def tiling(self) -> Tiling:
        return Tiling(
            self.size.longest_edge, self.max_image_size.longest_edge, Resample(self.resample)
        )


@dataclass(frozen=True)
class Idefics3(AnsweringFamily):
    """A checkpoint of Idefics3's shape."""

    name: ClassVar[str] = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    hub_names: ClassVar[str] = "Idefics3"
    token_keys: ClassVar[Mapping[str, str]] = {IMAGE_TOKEN_ID: IMAGE_TOKEN}
    question: ClassVar[str] = "Can you describe this image?"
    most_new_tokens: ClassVar[int] = 500

    config: Idefics3Config
    vision: Idefics3VisionConfig
    pixel_config: PixelConfig
    tokens: TileTokens

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        raw = checkpoint.config
        text = {"model_type": "llama", "eos_token_id": 2, **_text_section(raw)}
        if text["model_type"] != "llama":
            raise ConfigError(
                f"{CONFIG}: text_config.model_type={text['model_type']!r} (supported: 'llama')",
                hint="vlmport exports these models with a Llama-type decoder",
                code="config.unsupported-value",
            )
        config = read_config(Idefics3Config, raw, CONFIG)
        vision = Idefics3VisionConfig.read(
            subsection(raw, "vision_config", CONFIG), f"{CONFIG}: vision_config"
        )
        text = {**text, "tie_word_embeddings": config.tie_word_embeddings}
        pixels = read_config(PixelConfig, *read_image_processor(checkpoint))
        tokenizer, template = (
            read_tokenizer(checkpoint.tokenizer_folder),
            read_chat_template(checkpoint),
        )
        family = cls(
            config=config,
            vision=vision,
            text=DecoderConfig.read(text, f"{CONFIG}: text_config"),
            pixel_config=pixels,
            tokens=tile_tokens(
                tokenizer, pixels.tiling, _tokens_a_tile(config, vision, pixels.tiling.side)
            ),
            settings=answer_settings(checkpoint, text, template, tokenizer),
            chat_template=template,
            raw=raw,
        )
        family.check_token_ids(tokenizer)
        family._check_length(checkpoint)
        return family

    def _check_length(self, checkpoint: Checkpoint) -> None:
        """Raise ConfigError if files disagree about the number of image tokens of a tile."""
        said = (checkpoint.json(PROCESSOR) or {}).get("image_seq_len", self.tokens.count)
        if said != self.tokens.count:
            raise ConfigError(
                f"{PROCESSOR}: image_seq_len {said}, the tower gives {self.tokens.count} features "
                "a tile",
                hint=f"it is the patches of {PREPROCESSOR}'s max_image_size by scale_factor²",
                code="config.contradiction",
            )

    # Weights

    def weights(self, checkpoint: Checkpoint, adapter: Path | None) -> Mapping[str, LazyTensor]:
        tensors: Mapping[str, LazyTensor] = merged(
            checkpoint.weights,
            rename=plain_name,
            head=self.head,
            adapter=adapter,
            prefixes=("", "model.", "model.text_model."),
        )
        table = tensors.get(POSITIONS)
        if table is None:
            return tensors
        expected = (self.vision.num_patches, self.vision.hidden_size)
        if tuple(table.shape) != expected:
            raise WeightError(
                f"{POSITIONS!r}: {list(table.shape)}, expected {list(expected)}",
                hint="config.json and the weights must come from one model",
                code="weights.misshapen",
            )
        rows = bucketed_positions(self.tower.side, self.vision.side)
        return {**tensors, POSITIONS: PickedRows(table, rows)}

    # Graphs

    @property
    def tower(self) -> Idefics3VisionConfig:
        """The tower's config for images of the tiles' size."""
        return dataclasses.replace(self.vision, image_size=self.pixel_config.tiling.side)

    def fixed_graphs(self) -> Graphs:
        return {"image_processor": self._image_processor()}

    def _image_processor(self) -> GraphBuilder:
        """image u8[H, W, 3], do_image_splitting bool[] → pixel_values f32[1, n, 3, t, t],
        pixel_attention_mask bool[1, n, t, t] (all true), prompt_ids i64[T]."""
        builder = new_graph("image_processor")
        op, pixels = builder.op, self.pixel_config
        tiling = pixels.tiling
        image, split = image_input(builder), builder.input(SPLITTING, BOOL, [])
        tiles = tiling.cut(op, image, split)
        values = normalized_planes(
            op, tiles.planes, pixels.rescale_factor, pixels.image_mean, pixels.image_std
        )
        prompt_ids = self.tokens.write(op, tiles.rows, tiles.columns)
        square = [tiling.side, tiling.side]
        shape = op.Concat([1], op.Shape(tiles.planes, end=1), square, axis=0)
        mask = op.Expand(op.Constant(value=ir.tensor(np.array(True))), shape)
        values = op.Unsqueeze(values, [0])
        add_output(builder, values, "pixel_values", FLOAT, [1, "num_images", 3, *square])
        add_output(builder, mask, "pixel_attention_mask", BOOL, [1, "num_images", *square])
        add_output(builder, prompt_ids, "prompt_ids", INT64, ["num_prompt_ids"])
        return builder

    def vision_encoder(self, form: Format) -> GraphBuilder:
        """pixel_values f32[B, n, 3, t, t], pixel_attention_mask bool[B, n, t, t] →
        image_features f32[T, D].

        A mask says whether a tile is a real one or fills up a batch: padding is below and to the
        right, so the first pixel decides, and no tile is partly padded.
        """
        builder = new_graph("vision_encoder")
        op, width, tower = builder.op, self.text.hidden_size, self.tower
        batch, side = ["batch_size", "num_images"], tower.image_size
        pixels = builder.input("pixel_values", FLOAT, [*batch, 3, side, side])
        mask = builder.input("pixel_attention_mask", BOOL, [*batch, side, side])
        is_tile = op.Reshape(op.Slice(mask, [0, 0], [1, 1], [2, 3]), [-1])
        which = op.Reshape(op.NonZero(is_tile), [-1])
        tiles = op.Gather(op.Reshape(pixels, [-1, 3, side, side]), which, axis=0)
        patches = SiglipVisionTower(tower, form, "model.vision_model")(op, tiles)
        factor, vision = self.config.scale_factor, self.vision.hidden_size
        features = Connector("model.connector", tower.side, factor, vision, width, form)(
            op, patches
        )
        features = to_float32(op, op.Reshape(features, [-1, width]), form.dtype)
        add_output(builder, features, "image_features", FLOAT, ["num_features", width])
        return builder

    # What runtimes need to know

    @property
    def resample(self) -> int:
        return self.pixel_config.resample

    @property
    def image_options(self) -> Mapping[str, Any]:
        return {SPLITTING: self.pixel_config.do_image_splitting}

    @property
    def golden_options(self) -> Mapping[str, Any]:
        return {SPLITTING: False}  # 13 tiles would make a probe slower, but not stronger

    def golden_tokens(self, height: int, width: int) -> int:
        return len(self.tokens.alone)

    def hub_pixels(self) -> dict[str, Any]:
        return {
            "image_processor_type": f"{self.hub_names}ImageProcessor",
            "do_pad": True,
            **listed(dataclasses.asdict(self.pixel_config)),
        }

    def hub_processor(self) -> dict[str, Any]:
        return {"image_seq_len": self.tokens.count}

    def hub_sections(self) -> dict[str, dict[str, Any]]:
        vision, text = dataclasses.asdict(self.vision), dataclasses.asdict(self.text)
        del vision["vision_use_head"]  # SigLIP's alone
        text |= {"head_dim": self.text.head_size, "num_key_value_heads": self.text.kv_heads}
        return {
            "vision_config": {**(self.raw.get("vision_config") or {}), **vision},
            "text_config": {"model_type": "llama", **_text_section(self.raw), **text},
        }


def plain_name(key: str) -> str:
    """The graphs' name of a tensor: `model.text_model.x` is `model.x`.

    A model that was saved from its base class, without a head, lacks the first `model.`.
    """
    if key.startswith(("vision_model.", "connector.", "text_model.")):
        key = f"model.{key}"
    return key.replace("model.text_model.", "model.", 1)


def _text_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return text_config; an absent one is not an empty one."""
    if raw.get("text_config") is None:
        return {"rms_norm_eps": 1e-5}
    return subsection(raw, "text_config", CONFIG)


def _tokens_a_tile(config: Idefics3Config, vision: Idefics3VisionConfig, side: int) -> int:
    """Count a tile's tokens. Raises ConfigError if tower or pixel shuffle can't divide it."""
    patches, factor = side // vision.patch_size, config.scale_factor
    if not patches or patches % factor:
        raise ConfigError(
            f"{PREPROCESSOR}: tiles of {side} pixels are {patches} patches of {vision.patch_size} "
            f"a side, not a multiple of {CONFIG}'s scale_factor {factor}",
            hint="do all files belong to one model?",
            code="config.contradiction",
        )
    return (patches // factor) ** 2
