"""The config of a Llama-type decoder: Llama, SmolLM, and Qwen2 and Qwen3 as Qwen-VL has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vlmport.checkpoint import Layers, Size, read_config, subsection
from vlmport.errors import ConfigError

Section = tuple[Size, Size, Size]


@dataclass(frozen=True)
class DecoderConfig:
    """The keys of a Llama config that the graph needs, with the defaults of transformers 5.23.

    Attributes:
        qkv_bias: on queries, keys and values, and not on the output, independent of attention_bias.
        qk_norm: queries and keys are normalised head by head before they are rotated.
        mrope_section: how many of the rotary frequencies turn with the position in time, height
            and width; None where a token has one position.
        mrope_interleaved: whether the three alternate, or come one after the other.
        deepstack_lanes: how many further vectors an embedding carries, each added after a layer.
    """

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Size = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    mrope_section: Section | None = None
    mrope_interleaved: bool = False
    deepstack_lanes: int = 0

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_interleaved": (False,),
    }
    # What the kind of model says, not a key of its config.
    of_the_kind: ClassVar[tuple[str, ...]] = (
        "qkv_bias",
        "qk_norm",
        "mrope_section",
        "mrope_interleaved",
        "deepstack_lanes",
    )
    rope_types: ClassVar[tuple[str, ...]] = ("default",)

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Read a section of config.json, with the rope settings as in transformers 4 or 5.

        Raises ConfigError for values that this decoder does not compute.
        """
        keys = {key: value for key, value in raw.items() if key not in cls.of_the_kind}
        config = read_config(cls, {**keys, **cls._rope(raw, where)}, where)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise ConfigError for what the graph can't compute."""
        self.check_heads(where)
        if self.rope_theta <= 0:
            raise ConfigError(
                f"{where}: rope_theta {self.rope_theta:g}, expected more than 0",
                hint="is the file of another model? 10000 is the usual base",
                code="config.wrong-value",
            )
        if self.mrope_section and 2 * sum(self.mrope_section) != self.head_size:
            raise ConfigError(
                f"{where}: mrope_section {list(self.mrope_section)} shares out "
                f"{sum(self.mrope_section)} frequencies, head_dim {self.head_size} has "
                f"{self.head_size // 2}",
                hint="is the file of another model?",
                code="config.contradiction",
            )
        if self.deepstack_lanes > self.num_hidden_layers:
            raise ConfigError(
                f"{where}: {self.deepstack_lanes} DeepStack lanes, {self.num_hidden_layers} layers",
                hint="each is added after a layer of its own",
                code="config.contradiction",
            )

    def check_heads(self, where: str) -> None:
        """Raise ConfigError for heads that the graph can't compute."""
        if self.hidden_size % self.heads and self.head_dim is None:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.heads}",
                hint="set head_dim",
                code="config.contradiction",
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {self.heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}",
                hint="each key-value head serves the same number of heads",
                code="config.contradiction",
            )
        if self.head_size % 8:
            raise ConfigError(
                f"{where}: head_dim {self.head_size}, expected a multiple of 8",
                hint="ONNX Runtime's GroupQueryAttention takes no other",
                code="config.unsupported-value",
            )

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def embeds_size(self) -> int:
        """The width of an embedding with its lanes, D·(1+n)."""
        return self.hidden_size * (1 + self.deepstack_lanes)

    @classmethod
    def _rope(cls, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Read the rotary settings, in either spelling.

        transformers 5 writes `rope_parameters`, 4 `rope_scaling`; if a file has both, they must
        agree.
        Raises ConfigError for scaled rotary angles.
        """
        sections = [subsection(raw, name, where) for name in ("rope_parameters", "rope_scaling")]
        kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in sections if rope]
        if not all(kind in cls.rope_types for kind in kinds):
            raise ConfigError(
                f"{where}: rope_type={', '.join(sorted({*map(repr, kinds)}))}, expected "
                f"{' or '.join(map(repr, cls.rope_types))}",
                hint="scaled rotary embeddings are not supported yet",
                code="config.unsupported-value",
            )
        return agreed("rope_theta", [*sections, raw], where)


def agreed(key: str, sections: list[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Read a key of the sections, {} if none has it. Raises ConfigError if they disagree."""
    values = [section[key] for section in sections if key in section]
    if any(value != values[0] for value in values):
        raise ConfigError(
            f"{where}: {key} is given as {', '.join(map(repr, values))}",
            hint=f"rope_parameters, rope_scaling and {key} must agree",
            code="config.contradiction",
        )
    return {key: values[0]} if values else {}
