"""The form of each part of a model at each precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlmport.bundle import SUFFIXES, split_precisions
from vlmport.errors import ExportError, did_you_mean
from vlmport.graph.parameters import (
    FLOAT16,
    FLOAT32,
    INT4,
    INT4_FLOAT16,
    INT8,
    INT8_FLOAT16,
    W8A8,
    Format,
)


@dataclass(frozen=True)
class Precision:
    """The form of each part's matrices. Norms, biases and convolutions stay float32.

    Attributes:
        meaning: its description in the model card.
    """

    name: str
    meaning: str
    vision: Format
    embed: Format
    decoder: Format
    head: Format

    @property
    def suffix(self) -> str:
        """The Hub's file suffix."""
        return SUFFIXES[self.name]

    @property
    def is_half(self) -> bool:
        """Whether activations are float16 in any part."""
        parts = (self.vision, self.embed, self.decoder, self.head)
        return any(part.dtype == FLOAT16.dtype for part in parts)


# A 4-bit tower is slower than an 8-bit one and much less exact, so q4 keeps its tower at 8 bits.
_ALL = (
    Precision("fp32", "float32 throughout", FLOAT32, FLOAT32, FLOAT32, FLOAT32),
    Precision(
        "fp16", "float16 throughout, float32 at the edges", FLOAT16, FLOAT16, FLOAT16, FLOAT16
    ),
    Precision("q8", "8-bit weights and activations", W8A8, embed=INT8, decoder=W8A8, head=W8A8),
    Precision(
        "q4",
        "4-bit decoder, embedding and head; 8-bit vision tower",
        vision=INT8,
        embed=INT4,
        decoder=INT4,
        head=INT4,
    ),
    Precision(
        "q4f16",
        "as q4, in float16 where q4 is in float32",
        vision=INT8_FLOAT16,
        embed=INT4_FLOAT16,
        decoder=INT4_FLOAT16,
        head=INT4_FLOAT16,
    ),
)
PRECISIONS = {precision.name: precision for precision in _ALL}


def parse_precisions(names: str | Iterable[str]) -> tuple[Precision, ...]:
    """Parse 'fp32,q4' or a sequence of names into precisions, each once. Raises ExportError."""
    wanted = split_precisions(names)
    unknown = [name for name in wanted if name not in PRECISIONS]
    if unknown or not wanted:
        what = ", ".join(repr(name) + did_you_mean(name, PRECISIONS) for name in unknown)
        raise ExportError(
            f"unknown precision {what}" if unknown else "no precision named",
            hint=f"choose from {', '.join(PRECISIONS)}",
            code="precision.unknown",
        )
    return tuple(PRECISIONS[name] for name in wanted)
