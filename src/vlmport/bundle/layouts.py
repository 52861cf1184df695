"""Describe the layouts: the forms of folder that an export can be written in.

`hub` is the layout that the runtime and the browser run. The others are for programs that expect
certain files; `vlmport verify` compares them with PyTorch too.

To add a layout:
1. Describe it here, in LAYOUTS.
2. Write its graphs, as a `Layout` of the families that have it (families/base.py).
3. Write how its graphs are run (runtime/layouts/) and compared (parity/ladders/): a class each, and
   its line in the `__init__.py` there.
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


@dataclass(frozen=True)
class BundleLayout:
    """A form of folder.

    Attributes:
        name: its name in vlmport.json and for `vlmport export --layout`.
        description: a few words for the help of `vlmport export`; empty for the default layout.
        components: the components that every bundle of this layout has.
        many_rows: those of them that compute many rows in every call, such as an image's patches,
            rather than one row, as a decode step does. `auto` chooses their precision by that.
    """

    name: str
    description: str
    components: tuple[str, ...]
    many_rows: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.description})" if self.description else self.name


LAYOUTS: Mapping[str, BundleLayout] = {
    layout.name: layout
    for layout in (
        BundleLayout(
            HUB,
            "",
            ("image_processor", "vision_encoder", "embed_tokens", "decoder_model_merged"),
            many_rows=("vision_encoder",),
        ),
        BundleLayout(
            COMPONENTS,
            "a captioner's four files",
            ("image_processor", "vision_encoder", "projection", "prefix_init", "language_model"),
            many_rows=("vision_encoder", "projection"),
        ),
        BundleLayout(
            FUSED,
            "two graphs without a cache",
            ("image_processor", "vision", "text_with_image"),
            many_rows=("vision", "text_with_image"),
        ),
        BundleLayout(
            GENAI,
            "onnxruntime-genai's",
            ("image_processor", "position_ids", "vision", "embedding", "decoder"),
            many_rows=("vision",),
        ),
    )
}


@dataclass(frozen=True)
class ImageSize:
    """The size that a layout resizes every image to, in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """Parse '672x448': 672 wide, 448 high. Raises ExportError."""
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
