"""The graphs of the layout `fused` as functions on numpy arrays.

examples/fused_decode.py is a program that runs them without vlmport.

S tokens, T tokens of one image, I images, D hidden, n lanes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Golden
from vlmport.bundle.layouts import FUSED, ImageSize
from vlmport.errors import PromptError
from vlmport.runtime.graphs.base import IMAGE
from vlmport.runtime.graphs.components import merge_image_features
from vlmport.runtime.graphs.sessions import DTYPES
from vlmport.runtime.layouts.base import LayoutGraphs
from vlmport.runtime.layouts.golden import (
    Feeds,
    GoldenRun,
    check_fits,
    golden_image,
    length_faults,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

VISION, TEXT = "vision", "text_with_image"
EMBEDS = "image_embeds"
GOLDEN_TOKENS = 4  # without a cache, each token costs as much as the prompt


class Fused(LayoutGraphs):
    """The graphs of a bundle in the layout `fused`."""

    layout = FUSED
    outputs = {IMAGE: "pixel_values", VISION: "vision_features", TEXT: "logits"}  # noqa: RUF012

    @property
    def image_size(self) -> ImageSize:
        """The size that every image is resized to."""
        height, width = self.session(VISION).get_inputs()[0].shape[2:]
        return ImageSize(width, height)

    @property
    def image_tokens(self) -> int:
        """T, the number of tokens of one image."""
        return self.session(VISION).get_outputs()[0].shape[0]

    def prompt_ids(self) -> Int[np.ndarray, " T"]:
        """Return the ids that a prompt contains for an image."""
        return np.full(self.image_tokens, self.manifest.prompt.image_token_id, np.int64)

    def pixels(self, rgb: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "1 3 h w"]:
        """Resize and normalise one image."""
        return self.run(IMAGE, {"image": np.ascontiguousarray(rgb)})["pixel_values"]

    def encode(self, pixels: Float[np.ndarray, "1 3 h w"]) -> Float[np.ndarray, "T D·(1+n)"]:
        return self.run(VISION, {"pixel_values": pixels})["vision_features"]

    def logits(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "I·T D·(1+n)"]
    ) -> Float[np.ndarray, "S V"]:
        """Return float32 logits of every row.

        Raises PromptError for an id outside the vocabulary, or where the numbers of image tokens
        and features differ.
        """
        return self.batch_logits(ids[None], np.ones((1, len(ids)), np.int64), features)[0]

    def batch_logits(
        self,
        ids: Int[np.ndarray, "B S"],
        mask: Int[np.ndarray, "B S"],
        features: Float[np.ndarray, "I·T D·(1+n)"],
    ) -> Float[np.ndarray, "B S V"]:
        """Return the logits of several sequences, padded on either side; features in row order."""
        port = next(one for one in self.session(TEXT).get_inputs() if one.name == EMBEDS)
        width, token = port.shape[-1], self.manifest.prompt.image_token_id
        ids = self.checked(ids, TEXT)
        if len(features) % self.image_tokens:
            raise PromptError(
                f"{len(features)} features, expected a multiple of the {self.image_tokens} of "
                "an image",
                hint="concatenate the features that `encode` returns",
                code="prompt.wrong-features",
            )
        none = np.zeros((ids.size, width), np.float32)
        embeds = merge_image_features(none, ids.reshape(-1), features, token)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ascontiguousarray(mask, np.int64),
            EMBEDS: embeds.reshape(*ids.shape, width).astype(DTYPES[port.type]),
        }
        return self.run(TEXT, feeds)["logits"].astype(np.float32, copy=False)

    def greedy(
        self,
        ids: Int[np.ndarray, " S"],
        features: Float[np.ndarray, "I·T D·(1+n)"],
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
    ) -> tuple[list[int], Float[np.ndarray, "n V"]]:
        """Generate the most likely tokens up to and including a stop token, and their logits.

        The whole sequence is read again for each token. An image token that the model generates
        ends the answer, because no image belongs to it.
        """
        ends = {*stop_token_ids, self.manifest.prompt.image_token_id}
        rows, tokens = [], []
        while not tokens or (tokens[-1] not in ends and len(tokens) < max_new_tokens):
            rows.append(self.logits(np.array([*ids, *tokens]), features)[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, np.stack(rows)


def golden_run(graphs: Fused, golden: Golden, new_tokens: int) -> GoldenRun:
    """Run the golden input, and generate greedily up to GOLDEN_TOKENS, past any stop token."""
    new_tokens = min(new_tokens, GOLDEN_TOKENS)
    ids, features = _golden_prompt(graphs, golden)
    check_fits(graphs, len(ids) + new_tokens - 1)
    faults = length_faults(golden, len(ids), f"prompt has {len(ids)} tokens")
    tokens, logits = graphs.greedy(ids, features, new_tokens)
    return GoldenRun(len(ids), tuple(tokens), logits, faults)


def golden_feeds(graphs: Fused, golden: Golden) -> Feeds:
    """Yield the golden input at each graph.

    The golden prompt is image tokens alone, so its features are the whole of `image_embeds`.
    """
    pixels = graphs.pixels(golden_image(golden))
    ids, features = _golden_prompt(graphs, golden)
    graphs.close()  # the wide graphs take its place in memory
    yield VISION, {"pixel_values": pixels}
    mask = np.ones((1, len(ids)), np.int64)
    yield TEXT, {"input_ids": ids[None], "attention_mask": mask, EMBEDS: features[None]}


def _golden_prompt(
    graphs: Fused, golden: Golden
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, "S D·(1+n)"]]:
    """Ids and features of the image, `copies` times."""
    features = graphs.encode(graphs.pixels(golden_image(golden)))
    return np.tile(graphs.prompt_ids(), golden.copies), np.tile(features, (golden.copies, 1))
