"""The text configs of Qwen2.5-VL and Qwen3-VL, as options of the Llama-type decoder.

Source: transformers 5.23, configuration_qwen2_5_vl.py and configuration_qwen3_vl.py.

Some files tie the head outside of the text section: the caller sets `tie_word_embeddings`. It also
sets `deepstack_lanes`, which is in the vision section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmport.checkpoint import Layers, Size, subsection
from vlmport.errors import ConfigError
from vlmport.graph.decoder_config import DecoderConfig, Section, agreed


@dataclass(frozen=True)
class MropeConfig(DecoderConfig):
    """A decoder whose tokens have positions in time, height and width."""

    @classmethod
    def _rope(cls, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Read `rope_theta` and `mrope_section`; the kind of model decides if they interleave."""
        sections = [subsection(raw, name, where) for name in ("rope_parameters", "rope_scaling")]
        said = agreed("mrope_interleaved", sections, where)
        if said and said["mrope_interleaved"] is not cls.mrope_interleaved:
            raise ConfigError(
                f"{where}: mrope_interleaved={said['mrope_interleaved']!r}, expected "
                f"{cls.mrope_interleaved}",
                hint="is the file of another model?",
                code="config.unsupported-value",
            )
        return super()._rope(raw, where) | agreed("mrope_section", sections, where)


@dataclass(frozen=True)
class Qwen2_5TextConfig(MropeConfig):  # noqa: N801, the version is part of the name
    """Qwen2 with sectioned M-RoPE: biases on q, k and v."""

    vocab_size: Size = 152064
    hidden_size: Size = 8192
    intermediate_size: Size = 29568
    num_hidden_layers: Layers = 80
    num_attention_heads: Size = 64
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    qkv_bias: bool = True
    mrope_section: Section | None = (16, 24, 24)

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.must_be,
        "use_sliding_window": (False, None),
        "attention_bias": (False,),  # neither key is read by transformers
        "mlp_bias": (False,),
    }
    rope_types: ClassVar[tuple[str, ...]] = ("default", "mrope")


@dataclass(frozen=True)
class Qwen3TextConfig(MropeConfig):
    """Qwen3 with interleaved M-RoPE: norms on queries and keys, heads of any width, DeepStack."""

    vocab_size: Size = 151936
    hidden_size: Size = 4096
    intermediate_size: Size = 22016
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    max_position_embeddings: Size = 128000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    qk_norm: bool = True
    mrope_section: Section | None = (24, 20, 20)
    mrope_interleaved: bool = True

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.must_be,
        "mlp_bias": (False,),
    }
