"""What the reference makes of one picture: what every rung is fed, and held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import VerificationError
from vlmport.verify import metrics
from vlmport.verify.limits import SAME_NUMBERS
from vlmport.verify.pictures import Picture
from vlmport.verify.protocol import Generated, Reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Truth:
    """What the reference makes of one picture, from the bottom rung to the top.

    Attributes:
        prompt_ids, pixels, features: of the picture alone.
        made: greedy tokens and their logits.
        ids: prompt_ids and all new tokens but the last, which is never fed back.
        embeds, position_ids, logits: of ids.
    """

    prompt_ids: Int[np.ndarray, " P"]
    pixels: Mapping[str, np.ndarray]
    features: Float[np.ndarray, "T D"]
    made: Generated
    ids: Int[np.ndarray, " S"]
    embeds: Float[np.ndarray, "S D"]
    position_ids: Int[np.ndarray, "... S"]
    logits: Float[np.ndarray, "S V"]

    @classmethod
    def of(
        cls, reference: Reference, picture: Picture, max_new_tokens: int, image_token_id: int
    ) -> Truth:
        """Run the reference from the picture to the tokens, then once over all of them.

        An image token that the model itself says can't be fed back: the tokens end there.
        Raises VerificationError where the two passes differ.
        """
        prompt_ids = reference.prompt_ids(picture.image)
        pixels = reference.pixels(picture.image)
        features = reference.vision_features(pixels)
        made = reference.generate(reference.embeds(prompt_ids, features), max_new_tokens)
        if image_token_id in made.tokens:
            end = made.tokens.tolist().index(image_token_id) + 1
            made = Generated(made.tokens[:end], made.logits[:end])
        ids = np.concatenate([prompt_ids, made.tokens[:-1]])
        embeds, positions = reference.embeds(ids, features), reference.position_ids(ids)
        logits = reference.logits(embeds, positions)
        _check_positions(made, logits[len(prompt_ids) - 1 :])
        return cls(prompt_ids, pixels, features, made, ids, embeds, positions, logits)


def _check_positions(made: Generated, logits: Float[np.ndarray, "N V"]) -> None:
    """`generate` counts its positions itself: what it made must be what ours give."""
    apart = metrics.worst_error(logits, made.logits)
    if not SAME_NUMBERS["worst"].holds(apart):
        raise VerificationError(
            f"the reference contradicts itself: its generate and one pass with the positions that "
            f"the ladder takes for true are {apart:.2g} std apart",
            hint="nothing is said of the bundle; is this version of transformers a known one?",
        )
