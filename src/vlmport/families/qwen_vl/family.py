"""Qwen's vision-language models: images of any size, and positions in time, height and width.

Source: transformers 5.23, modeling_qwen2_5_vl.py, modeling_qwen3_vl.py, and
image_processing_pil_qwen2_vl.py, whose processor both have. A family defines its configs and its
tower; the rest is here.

Traps:
- The template writes the tokens around an image, `<|vision_start|>` and `<|vision_end|>`; the
  processor repeats `<|image_pad|>` between them.
- Names of tensors: transformers 4 has `visual.*` and `model.*`, 5 has `model.visual.*` and
  `model.language_model.*`. The graphs have those of 4.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx_ir as ir
from tokenizers import Tokenizer

from vlmport.bundle.layouts import FUSED, GENAI
from vlmport.checkpoint import Checkpoint, LazyTensor, merged, read_config, subsection
from vlmport.errors import ConfigError
from vlmport.families.answering import (
    CONFIG,
    IMAGE_TOKEN_ID,
    AnsweringConfig,
    AnsweringFamily,
    answer_settings,
    listed,
)
from vlmport.families.base import Graphs, Layout, SizedLayout
from vlmport.families.processor_config import PREPROCESSOR, read_image_processor
from vlmport.families.qwen_vl.layouts import fused, genai
from vlmport.families.qwen_vl.pixels import (
    MAX_PIXELS,
    MIN_PIXELS,
    PixelConfig,
    image_processor_graph,
)
from vlmport.families.qwen_vl.smart_resize import SmartResize
from vlmport.families.qwen_vl.tower import QwenVisionConfig
from vlmport.families.templates import read_chat_template
from vlmport.graph.builder import GraphBuilder, OpBuilder, add_output, new_graph, to_float32
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.mrope import position_ids_graph
from vlmport.graph.parameters import Format
from vlmport.text.tokenizer import read_tokenizer

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
EOS_TOKEN = "<|endoftext|>"  # by default: transformers 5.23, tokenization_qwen2.py
GOLDEN_TOKENS = 64  # minimum for the golden image: a shorter prompt proves less

# pixel_values and image_grid_thw → features [N / m², D·(1+n)], in the floats of the form
Tower = Callable[[OpBuilder, ir.Value, ir.Value], ir.Value]


@dataclass(frozen=True)
class QwenVLConfig(AnsweringConfig):
    """The keys of config.json other than its two sub-configs, with Hugging Face's defaults."""

    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653


@dataclass(frozen=True)
class QwenVL(AnsweringFamily):
    """A checkpoint of Qwen2.5-VL's or Qwen3-VL's shape.

    Attributes:
        unused_token_id: an id that no prompt can hold.
    """

    token_keys: ClassVar[Mapping[str, str]] = {
        IMAGE_TOKEN_ID: "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    question: ClassVar[str] = "Describe this image."
    most_new_tokens: ClassVar[int] = 128

    config: QwenVLConfig
    vision: QwenVisionConfig
    pixel_config: PixelConfig
    unused_token_id: int

    # What a family defines

    @classmethod
    @abstractmethod
    def text_section(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """The decoder's keys of config.json. Raises ConfigError."""

    @classmethod
    @abstractmethod
    def read_vision(cls, raw: Mapping[str, Any], where: str) -> QwenVisionConfig:
        """The tower's config, from its section. Raises ConfigError."""

    @classmethod
    @abstractmethod
    def read_text(
        cls, raw: Mapping[str, Any], vision: QwenVisionConfig, where: str
    ) -> DecoderConfig:
        """The decoder's config, from its section. Raises ConfigError."""

    @abstractmethod
    def vision_tower(self, form: Format) -> Tower:
        """The tower under the name `visual`."""

    # Reading

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        raw = checkpoint.config
        config = read_config(QwenVLConfig, raw, CONFIG)
        text = cls.text_section(raw)
        if not config.tie_word_embeddings and cls.ties_by_text_section(text):
            config = dataclasses.replace(config, tie_word_embeddings=True)
        tied = {"tie_word_embeddings": config.tie_word_embeddings}
        vision = cls.read_vision(
            subsection(raw, "vision_config", CONFIG), f"{CONFIG}: vision_config"
        )
        tokenizer, template = (
            read_tokenizer(checkpoint.tokenizer_folder),
            read_chat_template(checkpoint),
        )
        decoder = cls.read_text({**text, **tied}, vision, f"{CONFIG}: text_config")
        settings = answer_settings(checkpoint, text, template, tokenizer, EOS_TOKEN)
        family = cls(
            config=config,
            vision=vision,
            text=decoder,
            pixel_config=PixelConfig.read(*read_image_processor(checkpoint)),
            settings=settings,
            unused_token_id=unused_token_id(tokenizer, decoder.vocab_size, settings.stop_token_ids),
            chat_template=template,
            raw=raw,
        )
        family.check_token_ids(tokenizer)
        family._check()
        return family

    @classmethod
    def ties_by_text_section(cls, text: Mapping[str, Any]) -> bool:
        """Return whether the text section ties the head although the outer config does not."""
        return False

    def _check(self) -> None:
        """Raise ConfigError if files disagree."""
        vision, pixels = self.vision, self.pixel_config
        sizes = {
            "patch_size": (vision.patch_size, pixels.patch_size),
            "temporal_patch_size": (vision.temporal_patch_size, pixels.temporal_patch_size),
            "spatial_merge_size": (vision.spatial_merge_size, pixels.merge_size),
        }
        if wrong := [f"{key} {a} and {b}" for key, (a, b) in sizes.items() if a != b]:
            raise ConfigError(
                f"{CONFIG}'s vision_config and {PREPROCESSOR}: {', '.join(wrong)}",
                hint="both files must come from one model",
                code="config.contradiction",
            )
        if vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"{CONFIG}: out_hidden_size {vision.out_hidden_size} of the tower, hidden_size "
                f"{self.text.hidden_size} of the decoder",
                hint="does the file belong to this model?",
                code="config.contradiction",
            )

    # Weights

    def weights(self, checkpoint: Checkpoint, adapter: Path | None) -> Mapping[str, LazyTensor]:
        return merged(
            checkpoint.weights,
            rename=plain_name,
            head=self.head,
            adapter=adapter,
            prefixes=("", "model.", "model.language_model."),
        )

    # Graphs

    def fixed_graphs(self) -> Graphs:
        return {
            "image_processor": image_processor_graph(self.pixel_config, self.config.image_token_id),
            "position_ids": position_ids_graph(
                self.config.image_token_id, self.vision.spatial_merge_size
            ),
        }

    @property
    def layouts(self) -> Mapping[str, Layout | SizedLayout]:
        return {**super().layouts, FUSED: fused(self), GENAI: genai(self)}

    def vision_encoder(self, form: Format) -> GraphBuilder:
        """pixel_values f32[N, K], image_grid_thw i64[num_images, 3] →
        image_features f32[T, D·(1+n)]."""
        builder = new_graph("vision_encoder")
        op, width = builder.op, self.text.embeds_size
        rows = builder.input("pixel_values", FLOAT, ["num_patches", self.vision.patch_width])
        grids = builder.input("image_grid_thw", INT64, ["num_images", 3])
        features = to_float32(op, self.vision_tower(form)(op, rows, grids), form.dtype)
        add_output(builder, features, "image_features", FLOAT, ["num_features", width])
        return builder

    # What runtimes need to know

    @property
    def resample(self) -> int:
        return self.pixel_config.resample

    @property
    def image_options(self) -> Mapping[str, Any]:
        return {MIN_PIXELS: self.pixel_config.min_pixels, MAX_PIXELS: self.pixel_config.max_pixels}

    @property
    def golden_options(self) -> Mapping[str, Any]:
        """The fewest tokens that prove enough, in one copy of the image."""
        least = GOLDEN_TOKENS * self.pixel_config.patching.factor**2
        return {MIN_PIXELS: least, MAX_PIXELS: 2 * least}

    def golden_tokens(self, height: int, width: int) -> int:
        factor, limits = self.pixel_config.patching.factor, self.golden_options
        new = SmartResize(factor).sides_of(height, width, limits[MIN_PIXELS], limits[MAX_PIXELS])
        return math.prod(new) // factor**2

    def hub_pixels(self) -> dict[str, Any]:
        pixels = dataclasses.asdict(self.pixel_config)
        limits = pixels[MIN_PIXELS], pixels[MAX_PIXELS]
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            **listed(pixels),
            "size": dict(zip(("shortest_edge", "longest_edge"), limits, strict=True)),
        }

    def hub_sections(self) -> dict[str, dict[str, Any]]:
        text, vision = dataclasses.asdict(self.text), dataclasses.asdict(self.vision)
        text = {key: value for key, value in text.items() if key not in self.text.of_the_kind}
        text |= {"head_dim": self.text.head_size, "num_key_value_heads": self.text.kv_heads}
        raw = {"vision": self.raw.get("vision_config") or {}, "text": self.text_section(self.raw)}
        del text["rope_theta"], vision["rope_theta"]  # raw has rope_parameters or rope_scaling
        known = {"vision": vision, "text": text}
        return {
            f"{part}_config": {
                **raw[part],
                "model_type": f"{self.model_types[0]}_{part}",
                **listed(known[part]),
            }
            for part in ("vision", "text")
        }


def unused_token_id(tokenizer: Tokenizer, rows: int, others: Collection[int] = ()) -> int:
    """Find the last id that is no token's and not in `others`: an unused row of the embedding, if
    there is one, else the first id after all."""
    taken = {*tokenizer.get_vocab(with_added_tokens=True).values(), *others}
    spare = (one for one in reversed(range(rows)) if one not in taken)
    return next(spare, max(rows, max(taken) + 1))


def plain_name(key: str) -> str:
    """Return the name of a tensor in transformers 4: `model.visual.x` is `visual.x`.

    A model that was saved from its base class, without a head, has `language_model.x`.
    """
    others = {
        "model.visual.": "visual.",
        "model.language_model.": "model.",
        "language_model.": "model.",
    }
    for new, old in others.items():
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key
