"""The interface of a reference, as the ladder uses it. The modules of references/ implement it.

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
    """The output of a vision tower for one image.

    Attributes:
        pooled: None where the model has no pooling head.
    """

    last: Float[np.ndarray, "N W"]
    pooled: Float[np.ndarray, " W"] | None


class Reference(Protocol):
    """A checkpoint in float32. Every method takes and returns numpy arrays, without a batch.

    Attributes:
        versions: names and versions of the programs that compute it, for the report.
        dims: the checkpoint's sizes under the names of `vlmport.bundle.Dims`.
        stop_token_ids: the ids at which the model's own `generate` stops.
        grey_level: the largest step of `pixels` for one of 255 grey levels.
    """

    versions: str
    dims: Mapping[str, int]
    stop_token_ids: tuple[int, ...]
    grey_level: float

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """Make the requests to compare: with these images, and with whatever else the model takes,
        such as several images, text alone or options."""
        ...

    def image_ids(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> Int[np.ndarray, " T"]:
        """Return the ids of this image in a prompt."""
        ...

    def prompt_ids(self, request: Request) -> Int[np.ndarray, " S"]:
        """Return the ids of the whole prompt."""
        ...

    def pixels(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the vision encoder's inputs by name, with a batch of 1 where the model has one."""
        ...

    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """Compute the features that replace the embeddings of image tokens."""
        ...

    def embeds(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T D"]
    ) -> Float[np.ndarray, "S D"]:
        """Embed the ids, and write the features over the rows of image tokens."""
        ...

    def position_ids(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Int[np.ndarray, "... S"]:
        """Count the decoder's positions of a sequence from its start, [S] or [3, S].

        Args:
            pictures: the result of `pixels` for each image, in the order of their ids.
        """
        ...

    def logits(
        self, embeds: Float[np.ndarray, "S D"], position_ids: Int[np.ndarray, "... S"]
    ) -> Float[np.ndarray, "S V"]:
        """Run one pass over the whole sequence, without a cache."""
        ...

    def generate(
        self,
        embeds: Float[np.ndarray, "S D"],
        max_new_tokens: int,
        ids: Int[np.ndarray, " S"],
        pictures: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> Generated:
        """Decode greedily by Hugging Face's `generate`, with its cache.

        Args:
            ids, pictures: the source of the embeddings, as in `position_ids`, for a model that
                counts its positions from them.
        """
        ...


@runtime_checkable
class PrefixReference(Reference, Protocol):
    """A reference that reads images before any text, and whose tower and projection are apart."""

    def hidden_states(self, inputs: Mapping[str, np.ndarray]) -> HiddenStates:
        """Run the tower alone."""
        ...


@runtime_checkable
class FixedSizeReference(Reference, Protocol):
    """A reference whose processor takes images of any size, and can be held to one size."""

    def at_size(self, request: Request, width: int, height: int) -> Request:
        """Return the request with every image resized by the processor's filter, and with options
        under which the processor leaves it at that size."""
        ...

    def planes(self, pixels: Mapping[str, np.ndarray]) -> Float[np.ndarray, "1 3 h w"]:
        """Put the patches that `pixels` made of one image together again."""
        ...
