"""What the ladder asks both sides: a conversation and its pictures."""

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
    """One prompt.

    Attributes:
        name: for the report; no two of a run share one.
        messages: as a user gives them. Of a caption, what the reference takes for the bundle's
            own messages, which the bundle's side asks with.
        options: of the image processor, where they are not the defaults.
    """

    name: str
    pictures: tuple[Picture, ...]
    messages: tuple[Message, ...]
    is_caption: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        return [picture.image for picture in self.pictures]
