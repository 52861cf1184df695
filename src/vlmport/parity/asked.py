"""The requests that the ladder makes of both sides: a conversation and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmport.parity.pictures import Picture

if TYPE_CHECKING:
    from PIL import Image

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """A prompt with its images.

    Attributes:
        name: for the report; no two of a run share one.
        messages: as a user gives them. For a caption, the messages that the reference uses; the
            bundle's side uses those of its manifest.
        options: options of the image processor that differ from the defaults.
    """

    name: str
    pictures: tuple[Picture, ...]
    messages: tuple[Message, ...]
    is_caption: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        return [picture.image for picture in self.pictures]
