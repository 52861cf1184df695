"""The registry of model families: one folder and one line each."""

from __future__ import annotations

from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError, did_you_mean
from vlmport.families.base import Family
from vlmport.families.idefics3.family import Idefics3
from vlmport.families.idefics3.smolvlm import SmolVLM
from vlmport.families.prefix.family import PrefixCaptioner
from vlmport.families.qwen_vl.qwen2_5 import Qwen2_5VL
from vlmport.families.qwen_vl.qwen3 import Qwen3VL

FAMILIES: tuple[type[Family], ...] = (PrefixCaptioner, Idefics3, SmolVLM, Qwen2_5VL, Qwen3VL)
# Model types similar to supported ones → their description, and what to use instead.
NOT_SUPPORTED = {
    "qwen3_vl_moe": (
        "a mixture of experts",
        "use a dense model of the same kind, such as Qwen3-VL-2B, 4B, 8B or 32B",
    ),
    "qwen2_vl": ("an older kind of model than Qwen2.5-VL", "use Qwen2.5-VL or Qwen3-VL"),
    "qwen2_5_omni": ("a model for sound and video too", "use Qwen2.5-VL or Qwen3-VL"),
}


def reference_modules() -> dict[str, str]:
    """Map each model_type to the module that loads its reference: `reference.py` of its family.

    The modules are not imported here: they need PyTorch.
    """
    return {
        model_type: f"{family.__module__.rpartition('.')[0]}.reference"
        for family in FAMILIES
        for model_type in family.model_types
    }


def family_of(checkpoint: Checkpoint) -> Family:
    """Read the family that a checkpoint's model_type names. Raises ConfigError."""
    by_type = {model_type: family for family in FAMILIES for model_type in family.model_types}
    if (other := NOT_SUPPORTED.get(checkpoint.model_type)) is not None:
        raise ConfigError(
            f"{checkpoint.folder}: model_type {checkpoint.model_type!r} is {other[0]}, which is "
            "not supported",
            hint=other[1],
            code="model.unsupported",
        )
    if (family := by_type.get(checkpoint.model_type)) is None:
        raise ConfigError(
            f"{checkpoint.folder}: model_type {checkpoint.model_type!r} is not supported"
            f"{did_you_mean(checkpoint.model_type, by_type)}",
            hint=f"supported: {', '.join(by_type)}",
            code="model.unsupported",
        )
    return family.read(checkpoint)
