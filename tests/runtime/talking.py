"""What tests of conversations share: pictures, the work that was done, a fresh prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmport.runtime.conversation import Conversation
from vlmport.runtime.model import VLM

CANONICAL = " [b-d]{4}"  # whatever the model is: a text that is tokenized as it was generated


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@dataclass
class Work:
    """What was run since it was last taken: tiles encoded, tokens prefilled."""

    tiles: int = 0
    prefilled: list[int] = field(default_factory=list)

    def take(self) -> tuple[int, list[int]]:
        done = (self.tiles, self.prefilled)
        self.tiles, self.prefilled = 0, []
        return done


def fresh(vlm: VLM, chat: Conversation, **options: Any) -> tuple[int, ...]:
    """The tokens of the last answer when all before it is one prompt of its own."""
    return vlm.generate(chat.messages[:-1], **options).token_ids


def texts(messages: list[Any]) -> list[Any]:
    """Roles and words; a picture is '…'."""
    return [(m["role"], [part.get("text", "…") for part in m["content"]]) for m in messages]
