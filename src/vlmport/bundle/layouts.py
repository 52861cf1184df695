"""The layouts by name: forms of folder that an export can be written in.

`hub` is the one that the runtime and the browser run. The others are for programs that expect
certain files; `vlmport verify` proves them like it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from vlmport.errors import ExportError

HUB = "hub"
COMPONENTS = "components"
FUSED = "fused"
GENAI = "genai"

# Layout → the components that it can't be without.
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    HUB: ("image_processor", "vision_encoder", "embed_tokens", "decoder_model_merged"),
    COMPONENTS: (
        "image_processor",
        "vision_encoder",
        "projection",
        "prefix_init",
        "language_model",
    ),
    FUSED: ("image_processor", "vision", "text_with_image"),
    GENAI: ("image_processor", "position_ids", "vision", "embedding", "decoder"),
}


@dataclass(frozen=True)
class ImageSize:
    """The size that a layout resizes every picture to, in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """'672x448' is 672 wide and 448 high. Raises ExportError."""
        if isinstance(text, cls):
            return text
        found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", str(text))
        if found is None:
            raise ExportError(
                f"image size {str(text)[:40]!r}: expected WIDTHxHEIGHT in pixels",
                hint="such as 672x672",
                code="layout.wrong-image-size",
            )
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"
