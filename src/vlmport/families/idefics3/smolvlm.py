"""SmolVLM2 for images: Idefics3 under other names. Its videos are not exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmport.families.idefics3.family import Idefics3


@dataclass(frozen=True)
class SmolVLM(Idefics3):
    """A checkpoint whose config.json says `smolvlm`."""

    name: ClassVar[str] = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    hub_names: ClassVar[str] = "SmolVLM"
