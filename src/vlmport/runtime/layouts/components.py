"""The graphs of the layout `components` as functions on numpy arrays, for `verify` and the probe.

examples/components_loop.py is a program that runs them without vlmport.

N patches, P prefix rows, S new tokens, W the tower's width, D the decoder's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Golden
from vlmport.bundle.layouts import COMPONENTS
from vlmport.runtime.graphs.base import IMAGE as IMAGE
from vlmport.runtime.layouts.base import Cache, LayoutGraphs
from vlmport.runtime.layouts.golden import (
    Feeds,
    GoldenRun,
    check_fits,
    golden_image,
    length_faults,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

VISION, PROJECTION = "vision_encoder", "projection"
BEGIN, GO_ON = "prefix_init", "language_model"
OUTPUT = {
    IMAGE: "pixel_values",
    VISION: "last_hidden_state",
    PROJECTION: "projected_prefix",
    BEGIN: "logits",
    GO_ON: "logits",
}


@dataclass(frozen=True)
class Encoded:
    """The vision encoder's outputs for one image.

    Attributes:
        pooled: None where the checkpoint has no pooling head.
    """

    hidden: Float[np.ndarray, "N W"]
    pooled: Float[np.ndarray, " W"] | None


class FourFiles(LayoutGraphs):
    """The graphs of a bundle in the layout `components`, for one image."""

    layout = COMPONENTS
    outputs = OUTPUT

    def pixels(self, rgb: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "1 3 h w"]:
        """Resize and normalise one image."""
        return self.run(IMAGE, {"image": np.ascontiguousarray(rgb)})[OUTPUT[IMAGE]]

    def encode(self, pixels: Float[np.ndarray, "1 3 h w"]) -> Encoded:
        values = self.run(VISION, {"pixel_values": pixels})
        pooled = values.get("pooler_output")
        return Encoded(values[OUTPUT[VISION]][0], None if pooled is None else pooled[0])

    def project(self, hidden: Float[np.ndarray, "N W"]) -> Float[np.ndarray, "N D"]:
        return self.run(PROJECTION, {"vision_hidden_states": hidden[None]})[OUTPUT[PROJECTION]][0]

    def begin(
        self, prefix: Float[np.ndarray, "P D"], ids: Int[np.ndarray, " S"]
    ) -> tuple[Float[np.ndarray, "P+S V"], Cache]:
        """Run a prefix and the ids after it, maybe none; return all logits, and the cache.

        Raises PromptError for an id outside the vocabulary.
        """
        feeds = {"prefix_embeddings": prefix[None], "input_ids": self.checked(ids, BEGIN)[None]}
        return self._logits(BEGIN, feeds)

    def go_on(
        self, ids: Int[np.ndarray, " S"], cache: Cache
    ) -> tuple[Float[np.ndarray, "S V"], Cache]:
        """Run more ids; return their logits and the grown cache. Raises PromptError as `begin`."""
        past = next(iter(cache.values())).shape[2]
        positions = np.arange(past, past + len(ids), dtype=np.int64)
        mask = np.ones((1, past + len(ids)), np.int64)
        feeds = {"attention_mask": mask, "position_ids": positions[None], **cache}
        return self._logits(GO_ON, {"input_ids": self.checked(ids, GO_ON)[None], **feeds})

    def greedy(
        self,
        prefix: Float[np.ndarray, "P D"],
        ids: Int[np.ndarray, " S"],
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
    ) -> tuple[list[int], Float[np.ndarray, "n V"]]:
        """Generate the most likely tokens up to and including a stop token, and their logits."""
        stops = frozenset(stop_token_ids)
        logits, cache = self.begin(prefix, ids)
        rows = [logits[-1]]
        tokens = [int(logits[-1].argmax())]
        while tokens[-1] not in stops and len(tokens) < max_new_tokens:
            logits, cache = self.go_on(np.array(tokens[-1:]), cache)
            rows.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, np.stack(rows)

    def _logits(self, component: str, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Cache]:
        """Run a graph; return its logits, and the cache under the names of its inputs."""
        values = self.run(component, feeds)
        return values[OUTPUT[component]][0], self.presents(component, values)


def golden_run(files: FourFiles, golden: Golden, new_tokens: int) -> GoldenRun:
    """Run the golden input, and generate greedily, past any stop token."""
    prefix = _golden_prefix(files, golden)
    check_fits(files, len(prefix) + new_tokens - 1)
    faults = length_faults(golden, len(prefix), f"prefix has {len(prefix)} rows")
    tokens, logits = files.greedy(prefix, np.zeros(0, np.int64), new_tokens)
    return GoldenRun(len(prefix), tuple(tokens), logits, faults)


def golden_feeds(files: FourFiles, golden: Golden) -> Feeds:
    """Yield the golden input at each graph; `language_model` computes as `prefix_init` does."""
    pixels = files.pixels(golden_image(golden))
    yield VISION, {"pixel_values": pixels}
    yield PROJECTION, {"vision_hidden_states": files.encode(pixels).hidden[None]}
    prefix, none = _golden_prefix(files, golden), np.zeros((1, 0), np.int64)
    yield BEGIN, {"prefix_embeddings": prefix[None], "input_ids": none}


def _golden_prefix(files: FourFiles, golden: Golden) -> Float[np.ndarray, "P D"]:
    """The image's projected patches, `copies` times."""
    hidden = files.encode(files.pixels(golden_image(golden))).hidden
    return np.tile(files.project(hidden), (golden.copies, 1))
