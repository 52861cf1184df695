"""distilvit2's prefix captioner: SigLIP, a projection, and a Llama-type decoder with LoRA.

Source: the checkpoint format of tarekziade/distilvit2 (`PrefixConditioningVLM`), computed as
transformers 5.23 computes its parts.

Traps:
- The projected patches are the whole prompt: no BOS, no text. The first token of the caption
  comes from the logits at the last patch.
- The checkpoint has no image token. One is added as a new row of the embedding, which image
  features always overwrite; the head keeps the real vocabulary, so it can't be generated.
- LoRA is inside model.safetensors under PEFT's names; r and alpha are only in config.json.
- The stop token is the padding token of training (both are `<|endoftext|>`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from vlmport.bundle import Dims, GenerationSpec, PixelSpec, PromptSpec
from vlmport.bundle.layouts import COMPONENTS
from vlmport.bundle.manifest import CaptionMessage
from vlmport.checkpoint import (
    Checkpoint,
    HeadNames,
    LazyTensor,
    LoraScale,
    Size,
    merged,
    read_config,
    subsection,
)
from vlmport.errors import ConfigError
from vlmport.families.base import (
    Family,
    Graphs,
    HubFiles,
    Layout,
    SizedLayout,
    decoder_dims,
    pixel_spec,
    without_sampling,
)
from vlmport.families.generation_config import Generation
from vlmport.families.prefix.layouts import HEAD, LANGUAGE_MODEL, four_files
from vlmport.families.prefix.projection import Projection
from vlmport.families.prefix.siglip_head import folded_head
from vlmport.graph.builder import GraphBuilder, OpBuilder, add_output, new_graph, to_float32
from vlmport.graph.decoder import DecoderConfig, decoder_graph, embed_graph
from vlmport.graph.image import fixed_size_processor
from vlmport.graph.parameters import Format
from vlmport.graph.precision import Precision
from vlmport.graph.siglip import SiglipVisionConfig, SiglipVisionTower
from vlmport.text.tokenizer import new_token_id, read_tokenizer

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
IMAGE_TOKEN = "<image>"
CONFIG = "config.json"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{{- raise_exception('this captioner takes pictures and no text') -}}
{%- endif -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<image>' -}}
{%- else -%}
{{- raise_exception('this captioner takes pictures and no text') -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class PrefixConfig:
    """The keys of config.json other than its two sub-configs, with distilvit2's defaults."""

    projection_type: str = "linear"
    mlp_hidden_dim: Size = 2048
    lora_r: Size = 16
    lora_alpha: float = 16
    max_length: Size = 30

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {"projection_type": ("linear", "mlp")}


@dataclass(frozen=True)
class PixelConfig:
    """preprocessor_config.json, if there is one; else the defaults of SigLIP's processor."""

    resample: int = 3  # Pillow's code of bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_center_crop": (False, None),
        "do_pad": (False, None),
        "resample": (1, 2, 3),
    }


@dataclass(frozen=True)
class PrefixCaptioner(Family):
    """A prefix captioner, read from its checkpoint."""

    name: ClassVar[str] = "prefix"
    model_types: ClassVar[tuple[str, ...]] = ("prefix_conditioning_vlm",)

    config: PrefixConfig
    vision: SiglipVisionConfig
    text: DecoderConfig
    pixel_config: PixelConfig
    image_token_id: int
    settings: Generation
    raw_vision: Mapping[str, Any]
    raw_text: Mapping[str, Any]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        raw = checkpoint.config
        vision, text = (subsection(raw, key, CONFIG) for key in ("vision_config", "text_config"))
        # A whole SigLIP config holds both towers'.
        vision = subsection(vision, "vision_config", f"{CONFIG}: vision_config") or vision
        _check_types(vision, text)
        tokenizer = read_tokenizer(checkpoint.tokenizer_folder)
        return cls(
            config=read_config(PrefixConfig, raw, CONFIG),
            vision=SiglipVisionConfig.read(vision, f"{CONFIG}: vision_config"),
            text=DecoderConfig.read(text, f"{CONFIG}: text_config"),
            pixel_config=_pixel_config(checkpoint, vision),
            image_token_id=new_token_id(tokenizer, IMAGE_TOKEN),
            settings=Generation.read(checkpoint, text, f"{CONFIG}: text_config"),
            raw_vision=vision,
            raw_text=text,
        )

    # Weights

    def weights(self, checkpoint: Checkpoint, adapter: Path | None) -> Mapping[str, LazyTensor]:
        tensors = merged(
            checkpoint.weights,
            rename=plain_name,
            lora=LoraScale(self.config.lora_r, self.config.lora_alpha),
            head=self.head,
            adapter=adapter,
            prefixes=("", f"{LANGUAGE_MODEL}."),
        )
        return folded_head(tensors, self.vision, HEAD) if self.vision.vision_use_head else tensors

    @property
    def head(self) -> HeadNames:
        return HeadNames.of(LANGUAGE_MODEL, self.text.tie_word_embeddings)

    def with_weights(self, tensors: Mapping[str, LazyTensor]) -> Self:
        tied = self.head.are_tied(tensors)
        if tied == self.text.tie_word_embeddings:
            return self
        return dataclasses.replace(
            self,
            text=dataclasses.replace(self.text, tie_word_embeddings=tied),
            raw_text={**self.raw_text, "tie_word_embeddings": tied},
        )

    def is_unused(self, key: str) -> bool:
        """Return whether it is the pooling head's, if the config has one: captions read patches."""
        return self.vision.vision_use_head and key.startswith(f"{HEAD}.")

    # Graphs

    def fixed_graphs(self) -> Graphs:
        return {"image_processor": self.image_processor()}

    def graphs(self, precision: Precision) -> Graphs:
        rows = self.image_token_id + 1
        extra = max(0, rows - self.text.vocab_size)
        return {
            "vision_encoder": self._vision_encoder(precision.vision),
            "embed_tokens": embed_graph(self.text, LANGUAGE_MODEL, precision.embed, extra),
            "decoder_model_merged": decoder_graph(
                self.text, LANGUAGE_MODEL, precision.decoder, precision.head
            ),
        }

    @property
    def layouts(self) -> Mapping[str, Layout | SizedLayout]:
        return {**super().layouts, COMPONENTS: four_files(self)}

    def image_processor(self, *, with_prompt: bool = True) -> GraphBuilder:
        """image u8[H, W, 3] → pixel_values f32[1, 3, size, size], prompt_ids i64[T]."""
        size = self.vision.image_size
        builder = fixed_size_processor(size, size, self.pixel_config)
        if not with_prompt:
            return builder
        op = builder.op
        ids = np.full(self.image_tokens, self.image_token_id, np.int64)
        prompt_ids = op.Identity(op.initializer(ir.tensor(ids, name="image_token_ids")))
        add_output(builder, prompt_ids, "prompt_ids", INT64, [self.image_tokens])
        return builder

    def _vision_encoder(self, form: Format) -> GraphBuilder:
        """pixel_values f32[B, 3, size, size] → image_features f32[B·N, D]."""
        builder = new_graph("vision_encoder")
        op, size, width = builder.op, self.vision.image_size, self.text.hidden_size
        pixels = builder.input("pixel_values", FLOAT, ["batch_size", 3, size, size])
        patches = SiglipVisionTower(self.vision, form, "vision_encoder")(op, pixels)
        features = op.Reshape(self.project(op, patches, form), [-1, width])
        features = to_float32(op, features, form.dtype)
        add_output(builder, features, "image_features", FLOAT, ["num_features", width])
        return builder

    def project(self, op: OpBuilder, patches: ir.Value, form: Format) -> ir.Value:
        """Patches [B, N, vision width] → [B, N, D]."""
        inner = self.config.mlp_hidden_dim if self.config.projection_type == "mlp" else None
        return Projection(self.vision.hidden_size, self.text.hidden_size, inner, form)(op, patches)

    # What runtimes need to know

    @property
    def dims(self) -> Dims:
        return decoder_dims(self.text)

    @property
    def prompt(self) -> PromptSpec:
        caption: CaptionMessage = {"role": "user", "content": [{"type": "image"}]}
        return PromptSpec(IMAGE_TOKEN, self.image_token_id, self.image_token_id, (caption,))

    @property
    def generation(self) -> GenerationSpec:
        # distilvit2 itself writes a length into config.json only. Its generate(inputs_embeds=…)
        # shows processors new tokens only.
        return self.settings.spec(self.config.max_length, processors_see_prompt=False)

    @property
    def pixels(self) -> PixelSpec:
        return pixel_spec(self.pixel_config.resample)

    @property
    def image_tokens(self) -> int:
        return self.vision.num_patches

    def golden_tokens(self, height: int, width: int) -> int:
        return self.image_tokens

    def hub_files(self) -> HubFiles:
        """The layout of transformers.js' llava, whose graphs and prompt ours are."""
        size, pixels = self.vision.image_size, self.pixel_config
        return HubFiles(
            config={
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                "image_token_index": self.image_token_id,
                "image_seq_length": self.image_tokens,
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
                "projector_hidden_act": "gelu",
                "tie_word_embeddings": False,
                "eos_token_id": list(self.settings.stop_token_ids),
                "pad_token_id": self.settings.pad_token_id,
                "vision_config": dict(self.raw_vision),
                "text_config": {
                    **without_sampling(self.raw_text),
                    "head_dim": self.text.head_size,
                    "num_key_value_heads": self.text.kv_heads,
                },
            },
            preprocessor_config={
                "image_processor_type": "SiglipImageProcessor",
                "processor_class": "LlavaProcessor",
                "do_resize": True,
                "size": {"height": size, "width": size},
                "resample": pixels.resample,
                "do_rescale": True,
                "rescale_factor": pixels.rescale_factor,
                "do_normalize": True,
                "image_mean": list(pixels.image_mean),
                "image_std": list(pixels.image_std),
            },
            processor_config={
                "processor_class": "LlavaProcessor",
                "image_token": IMAGE_TOKEN,
                "patch_size": self.vision.patch_size,
                "num_additional_image_tokens": 0,
                "vision_feature_select_strategy": "full",
            },
            generation_config=self.settings.hub_config(self.generation.max_new_tokens),
            chat_template=CHAT_TEMPLATE,
            new_tokens=(IMAGE_TOKEN,),
            pipeline_tag="image-to-text",  # it takes no text, as image-text-to-text would promise
            description="an image captioner",
            image_before_text=True,
        )


def plain_name(key: str) -> str:
    """Return the graphs' name of a tensor: without transformers 4's `vision_model`, and with the
    `model` that a decoder lacks if it was saved from its base class, without a head."""
    key = key.replace("vision_encoder.vision_model.", "vision_encoder.", 1)
    if key.startswith(
        tuple(f"{LANGUAGE_MODEL}.{part}." for part in ("embed_tokens", "layers", "norm"))
    ):
        key = key.replace(f"{LANGUAGE_MODEL}.", f"{LANGUAGE_MODEL}.model.", 1)
    return key


def _check_types(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Check the types of encoder and decoder. Raises ConfigError."""
    expected = {"vision_config": (vision, "siglip_vision_model"), "text_config": (text, "llama")}
    wrong = [
        f"{section}.model_type={raw.get('model_type')!r} (supported: {kind!r})"
        for section, (raw, kind) in expected.items()
        if raw.get("model_type") != kind
    ]
    if wrong:
        raise ConfigError(
            f"{CONFIG}: {'; '.join(wrong)}",
            hint="vlmport exports prefix captioners of a SigLIP encoder and a Llama-type decoder",
            code="config.unsupported-value",
        )


def _pixel_config(checkpoint: Checkpoint, vision: Mapping[str, Any]) -> PixelConfig:
    """Read preprocessor_config.json, if there is one. Raises ConfigError."""
    where = "preprocessor_config.json"
    raw = checkpoint.json(where) or {}
    size, expected = raw.get("size"), vision.get("image_size", SiglipVisionConfig.image_size)
    if size is not None and size != {"height": expected, "width": expected}:
        raise ConfigError(
            f"{where}: size {size}, expected {expected} x {expected}, the encoder's image_size",
            hint="make the two files agree",
            code="config.contradiction",
        )
    return read_config(PixelConfig, raw, where)
