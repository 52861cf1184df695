"""Qwen2.5-VL: a tower of windows, and a Qwen2 decoder with positions by section.

Source: transformers 5.23, modeling_qwen2_5_vl.py and configuration_qwen2_5_vl.py.

Traps:
- transformers 4 writes the decoder's keys at the top of config.json, without a text_config.
- A head is tied where config.json says so, or its text_config does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmport.checkpoint import subsection
from vlmport.families.answering import CONFIG
from vlmport.families.qwen_vl.family import QwenVL, Tower
from vlmport.families.qwen_vl.text import Qwen2_5TextConfig
from vlmport.families.qwen_vl.tower import QwenVisionConfig
from vlmport.families.qwen_vl.tower_2_5 import Qwen2_5VisionConfig, VisionTower
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.parameters import Format


@dataclass(frozen=True)
class Qwen2_5VL(QwenVL):  # noqa: N801, the version is part of the name
    """A checkpoint whose config.json says `qwen2_5_vl`."""

    name: ClassVar[str] = "qwen2_5_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    hub_names: ClassVar[str] = "Qwen2_5_VL"

    vision: Qwen2_5VisionConfig

    @classmethod
    def text_section(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        if raw.get("text_config") is not None:
            text = subsection(raw, "text_config", CONFIG)
        else:
            text = {key: value for key, value in raw.items() if key not in OUTER_KEYS}
        return {"eos_token_id": EOS_TOKEN_ID, **text}

    @classmethod
    def ties_by_text_section(cls, text: Mapping[str, Any]) -> bool:
        return text.get("tie_word_embeddings") is True

    @classmethod
    def read_vision(cls, raw: Mapping[str, Any], where: str) -> QwenVisionConfig:
        return Qwen2_5VisionConfig.read(raw, where)

    @classmethod
    def read_text(
        cls, raw: Mapping[str, Any], vision: QwenVisionConfig, where: str
    ) -> DecoderConfig:
        return Qwen2_5TextConfig.read(raw, where)

    def vision_tower(self, form: Format) -> Tower:
        return VisionTower(self.vision, form, "visual")


EOS_TOKEN_ID = 151645  # Qwen2_5_VLTextConfig's default; Qwen3VLTextConfig has none

# Keys at the top of config.json that are not the decoder's.
OUTER_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "image_token_id",
        "model_type",
        "tie_word_embeddings",
        "transformers.js_config",
        "transformers_version",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_start_token_id",
        "vision_token_id",
    }
)
