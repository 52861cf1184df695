"""Qwen3-VL: a tower with learnt positions and DeepStack, and a Qwen3 decoder whose positions take
turns.

Source: transformers 5.23, modeling_qwen3_vl.py and configuration_qwen3_vl.py.

Traps:
- The width of a head is a value of its own: in the 4B and the 32B model it is not hidden_size by
  heads.
- Features of three layers of the tower are added after the first three layers of the decoder; an
  embedding carries them as lanes after its own values.
- Only the outer config decides whether the head is tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from vlmport.checkpoint import subsection
from vlmport.errors import ConfigError
from vlmport.families.answering import CONFIG
from vlmport.families.qwen_vl.family import QwenVL, Tower
from vlmport.families.qwen_vl.text import Qwen3TextConfig
from vlmport.families.qwen_vl.tower import QwenVisionConfig
from vlmport.families.qwen_vl.tower_3 import Qwen3VisionConfig, VisionTower
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.parameters import Format


@dataclass(frozen=True)
class Qwen3VL(QwenVL):
    """A checkpoint whose config.json says `qwen3_vl`: the dense models."""

    name: ClassVar[str] = "qwen3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    hub_names: ClassVar[str] = "Qwen3VL"

    vision: Qwen3VisionConfig

    @classmethod
    def text_section(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return subsection(raw, "text_config", CONFIG)

    @classmethod
    def read_vision(cls, raw: Mapping[str, Any], where: str) -> Qwen3VisionConfig:
        return Qwen3VisionConfig.read(raw, where)

    @classmethod
    def read_text(
        cls, raw: Mapping[str, Any], vision: QwenVisionConfig, where: str
    ) -> DecoderConfig:
        assert isinstance(vision, Qwen3VisionConfig)
        text = Qwen3TextConfig.read(raw, where)
        lanes = len(vision.deepstack_visual_indexes)
        if lanes > text.num_hidden_layers:
            raise ConfigError(
                f"{where}: num_hidden_layers {text.num_hidden_layers} are fewer than the {lanes} "
                "deepstack_visual_indexes of vision_config",
                hint="each is added after a layer of its own; does the file belong to this model?",
                code="config.contradiction",
            )
        return replace(text, deepstack_lanes=lanes)

    def vision_tower(self, form: Format) -> Tower:
        return VisionTower(self.vision, form, "visual")
