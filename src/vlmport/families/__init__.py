"""The registry of model families: one line each."""

from __future__ import annotations

from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError, did_you_mean
from vlmport.families.base import Family
from vlmport.families.idefics3 import Idefics3
from vlmport.families.prefix import PrefixCaptioner
from vlmport.families.qwen2_5_vl import Qwen2_5VL
from vlmport.families.qwen3_vl import Qwen3VL
from vlmport.families.smolvlm import SmolVLM

FAMILIES: tuple[type[Family], ...] = (PrefixCaptioner, Idefics3, SmolVLM, Qwen2_5VL, Qwen3VL)
EXPERTS = ("qwen3_vl_moe",)  # model types of mixtures of experts, which are not computed


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that a checkpoint's model_type names, read from it. Raises ConfigError."""
    by_type = {model_type: family for family in FAMILIES for model_type in family.model_types}
    if checkpoint.model_type in EXPERTS:
        raise ConfigError(
            f"{checkpoint.folder}: model_type {checkpoint.model_type!r} is a mixture of experts, "
            "which is not supported",
            hint="take a dense model of the same kind, such as Qwen3-VL-2B, 4B, 8B or 32B",
        )
    if (family := by_type.get(checkpoint.model_type)) is None:
        raise ConfigError(
            f"{checkpoint.folder}: model_type {checkpoint.model_type!r} is not supported"
            f"{did_you_mean(checkpoint.model_type, by_type)}",
            hint=f"supported: {', '.join(by_type)}",
        )
    return family.read(checkpoint)
