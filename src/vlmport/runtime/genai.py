"""The graphs of the layout `genai` as functions on numpy arrays, fed as onnxruntime-genai does.

S new tokens, P past tokens, T tokens of all pictures, D hidden, n lanes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.layouts import GENAI
from vlmport.runtime.components import ProcessedImage, process_image
from vlmport.runtime.layout_graphs import IMAGE, POSITIONS, Cache, LayoutGraphs
from vlmport.runtime.positions import Positions, computed
from vlmport.runtime.sessions import DTYPES

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

VISION, EMBEDDING, DECODER = "vision", "embedding", "decoder"


class GenaiGraphs(LayoutGraphs):
    """The graphs of a bundle in the layout `genai`."""

    layout = GENAI
    outputs = {  # noqa: RUF012
        IMAGE: "pixel_values",
        POSITIONS: "position_ids",
        VISION: "image_features",
        EMBEDDING: "inputs_embeds",
        DECODER: "logits",
    }

    def process_image(
        self, rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
    ) -> ProcessedImage:
        """As vlmport's own processor does. Raises as runtime.components.process_image."""
        options = {**self.manifest.image_options, **(options or {})}
        return process_image(self.session(IMAGE), rgb, options)

    def encode(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D·(1+n)"]:
        """The vision graph's inputs by name, of one picture or of several."""
        return self.run(VISION, inputs)["image_features"]

    def embed(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T D·(1+n)"] | None = None
    ) -> Float[np.ndarray, "S D·(1+n)"]:
        """Embeddings, the features where the image tokens are.

        Raises PromptError for an id outside the vocabulary, or other numbers of the two.
        """
        if features is None:
            width = self.session(EMBEDDING).get_outputs()[0].shape[-1]
            features = np.zeros((0, width), np.float32)
        feeds = {"input_ids": self.checked(ids)[None], "image_features": features}
        return self.run(EMBEDDING, feeds)["inputs_embeds"][0]

    def positions(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]]
    ) -> Positions:
        """Of a prompt, by the graph; onnxruntime-genai computes the same by itself."""
        return computed(self.session(POSITIONS), ids, pictures, POSITIONS)

    def decode(
        self,
        embeds: Float[np.ndarray, "S D·(1+n)"],
        positions: Int[np.ndarray, "... S"],
        cache: Cache | None = None,
    ) -> tuple[Float[np.ndarray, " V"], Cache]:
        """float32 logits of the last row, and the grown cache.

        Args:
            positions: on as many axes as the decoder takes.
        """
        cache = self._no_cache() if cache is None else cache
        past = next(iter(cache.values())).shape[2]
        feeds = {
            "inputs_embeds": embeds[None],
            "attention_mask": np.ones((1, past + len(embeds)), np.int64),
            "position_ids": np.ascontiguousarray(positions[..., None, :], np.int64),
            **cache,
        }
        values = self.run(DECODER, feeds)
        logits = values["logits"].astype(np.float32, copy=False)
        return logits[0, -1], self.presents(DECODER, values)

    def _no_cache(self) -> Cache:
        dims, prefix = self.manifest.dims, self.manifest.cache.past
        shape = (1, dims.num_key_value_heads, 0, dims.head_dim)
        return {
            one.name: np.zeros(shape, DTYPES[one.type])
            for one in self.session(DECODER).get_inputs()
            if one.name.startswith(prefix)
        }

    def greedy(
        self,
        embeds: Float[np.ndarray, "P D·(1+n)"],
        positions: Positions,
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
    ) -> tuple[list[int], Float[np.ndarray, "n V"]]:
        """The most likely tokens up to a stop token, it included, and the logits of each.

        Ends before an image token that the model says itself: no picture belongs to it.
        """
        ends = {*stop_token_ids, self.manifest.prompt.image_token_id}
        logits, cache = self.decode(embeds, positions.ids)
        rows, tokens = [logits], [int(logits.argmax())]
        while tokens[-1] not in ends and len(tokens) < max_new_tokens:
            at = len(embeds) + len(tokens) - 1 + positions.offset
            step = np.full((*positions.ids.shape[:-1], 1), at, np.int64)
            logits, cache = self.decode(self.embed(np.array(tokens[-1:])), step, cache)
            rows.append(logits)
            tokens.append(int(logits.argmax()))
        return tokens, np.stack(rows)
