"""The reference's results for one request, which every rung is fed and compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import VerificationError
from vlmport.parity import metrics
from vlmport.parity.asked import Request
from vlmport.parity.limits import SAME_NUMBERS
from vlmport.parity.protocol import Generated, Reference
from vlmport.parity.reference_errors import reference_reads

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL import Image


@dataclass(frozen=True)
class PictureTruth:
    """The reference's results for one image: its ids in a prompt, its pixels, its features."""

    ids: Int[np.ndarray, " T"]
    pixels: Mapping[str, np.ndarray]
    features: Float[np.ndarray, "T D"]


@dataclass(frozen=True)
class Truth:
    """The reference's results for one request, from the bottom rung to the top.

    Attributes:
        prompt_ids: the ids of the whole prompt.
        features: those of all images, in their order.
        made: greedy tokens and their logits.
        is_cut: whether `made` ends with an image token that the model generated. The next token is
            unknown, since an image token can't be fed back.
        ids: prompt_ids and all new tokens but the last, which is never fed back.
        embeds, position_ids, logits: the results for ids.
        offset: the position after the prompt, minus the number of its tokens (rope_delta).
    """

    pictures: tuple[PictureTruth, ...]
    prompt_ids: Int[np.ndarray, " P"]
    features: Float[np.ndarray, "T D"]
    made: Generated
    ids: Int[np.ndarray, " S"]
    embeds: Float[np.ndarray, "S D"]
    position_ids: Int[np.ndarray, "... S"]
    logits: Float[np.ndarray, "S V"]
    offset: int = 0
    is_cut: bool = False

    @classmethod
    def of(
        cls, reference: Reference, request: Request, max_new_tokens: int, image_token_id: int
    ) -> Truth:
        """Run the reference from the images to the tokens, then once over the whole sequence.

        Raises RefusedError for a request that the reference can't read, VerificationError where
        it can't be run, and where its two passes differ.
        """
        pictures = tuple(_picture(reference, image, request.options) for image in request.images)
        with reference_reads():
            prompt_ids = reference.prompt_ids(request)
        pixels = [picture.pixels for picture in pictures]
        features = np.zeros((0, reference.dims["hidden_size"]), np.float32)
        if pictures:  # their features may be wider
            features = np.concatenate([picture.features for picture in pictures])
        embeds = reference.embeds(prompt_ids, features)
        made = reference.generate(embeds, max_new_tokens, prompt_ids, pixels)
        is_cut = image_token_id in made.tokens
        if is_cut:
            end = made.tokens.tolist().index(image_token_id) + 1
            made = Generated(made.tokens[:end], made.logits[:end])
        ids = np.concatenate([prompt_ids, made.tokens[:-1]])
        embeds, positions = reference.embeds(ids, features), reference.position_ids(ids, pixels)
        logits = reference.logits(embeds, positions)
        _check_positions(made, logits[len(prompt_ids) - 1 :])
        after = np.append(prompt_ids, int(image_token_id == 0))  # any word
        offset = int(reference.position_ids(after, pixels)[..., -1].max()) - len(prompt_ids)
        return cls(
            pictures, prompt_ids, features, made, ids, embeds, positions, logits, offset, is_cut
        )

    @property
    def pixels(self) -> list[Mapping[str, np.ndarray]]:
        """The vision encoder's inputs of each image."""
        return [picture.pixels for picture in self.pictures]


def _picture(reference: Reference, image: Image.Image, options: Mapping[str, Any]) -> PictureTruth:
    with reference_reads():
        pixels = reference.pixels(image, options)
        ids = reference.image_ids(image, options)
    return PictureTruth(ids, pixels, reference.vision_features(pixels))


def _check_positions(made: Generated, logits: Float[np.ndarray, "N V"]) -> None:
    """Compare `generate`, which counts positions itself, with one pass at our positions."""
    apart = metrics.worst_error(logits, made.logits)
    if not SAME_NUMBERS["worst"].holds(apart):
        raise VerificationError(
            f"the reference contradicts itself: its generate and one pass with the positions that "
            f"the ladder takes for true are {apart:.2g} std apart",
            hint="nothing is known about the bundle; check the version of transformers",
            code="verify.reference-contradicts-itself",
        )
