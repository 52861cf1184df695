"""What the ladder asks of a reference. No torch here: the modules of references/ fulfil it.

S sequence, T image tokens, D hidden, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlmport.parity.asked import Request
from vlmport.parity.pictures import Picture

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Generated:
    """Greedy tokens, a stop token included, and the logits that each was chosen from."""

    tokens: Int[np.ndarray, " N"]
    logits: Float[np.ndarray, "N V"]


@dataclass(frozen=True)
class HiddenStates:
    """What a vision tower makes of one picture.

    Attributes:
        pooled: None where the model has no pooling head.
    """

    last: Float[np.ndarray, "N W"]
    pooled: Float[np.ndarray, " W"] | None


class Reference(Protocol):
    """One checkpoint in float32. Every method takes and gives numpy arrays, without a batch.

    Attributes:
        versions: the programs that the numbers come from, for the report.
        dims: the checkpoint's sizes under the names of `vlmport.bundle.Dims`.
        stop_token_ids: the ids at which the model's own `generate` stops.
        grey_level: what one level of 255 comes to in `pixels`, at the most.
    """

    versions: str
    dims: Mapping[str, int]
    stop_token_ids: tuple[int, ...]
    grey_level: float

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """What to compare, with these pictures and whatever else the model is asked with: several
        pictures, text alone, options."""
        ...

    def image_ids(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> Int[np.ndarray, " T"]:
        """The ids that stand in a prompt for this picture."""
        ...

    def prompt_ids(self, request: Request) -> Int[np.ndarray, " S"]:
        """The ids of the whole prompt."""
        ...

    def pixels(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """The vision encoder's inputs by name, with a leading batch of 1 where the model has it."""
        ...

    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """What replaces the image tokens' embeddings."""
        ...

    def embeds(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T D"]
    ) -> Float[np.ndarray, "S D"]:
        """Embeddings of the ids, the features written over the image tokens' rows."""
        ...

    def position_ids(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Int[np.ndarray, "... S"]:
        """The decoder's positions of a sequence from its start, [S] or [3, S].

        Args:
            pictures: what `pixels` gave for each picture, in the order of their ids.
        """
        ...

    def logits(
        self, embeds: Float[np.ndarray, "S D"], position_ids: Int[np.ndarray, "... S"]
    ) -> Float[np.ndarray, "S V"]:
        """One pass over the whole sequence, without a cache."""
        ...

    def generate(
        self,
        embeds: Float[np.ndarray, "S D"],
        max_new_tokens: int,
        ids: Int[np.ndarray, " S"],
        pictures: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> Generated:
        """Greedy decoding by Hugging Face's `generate`, with its cache.

        Args:
            ids, pictures: what the embeddings were made of, as in `position_ids`: for a model that
                counts its positions from them.
        """
        ...


@runtime_checkable
class PrefixReference(Reference, Protocol):
    """One whose pictures are read before any text, and whose tower and projection are apart."""

    def hidden_states(self, inputs: Mapping[str, np.ndarray]) -> HiddenStates:
        """The tower alone."""
        ...


@runtime_checkable
class FixedSizeReference(Reference, Protocol):
    """One whose processor takes pictures of any size, and can be held to one."""

    def at_size(self, request: Request, width: int, height: int) -> Request:
        """The request with every picture resized to this size by the processor's filter, and
        options under which the processor leaves it so."""
        ...

    def planes(self, pixels: Mapping[str, np.ndarray]) -> Float[np.ndarray, "1 3 h w"]:
        """What `pixels` gave for one picture, the patches put together again."""
        ...
