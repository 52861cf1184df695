"""The graphs of the layout `genai` as functions on numpy arrays, fed as onnxruntime-genai does.

S new tokens, P past tokens, T tokens of all images, D hidden, n lanes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import Golden
from vlmport.bundle.layouts import GENAI
from vlmport.errors import BundleError
from vlmport.files.json_files import load_json
from vlmport.runtime.graphs.base import IMAGE, POSITIONS
from vlmport.runtime.graphs.image_processor import ProcessedImage, process_image
from vlmport.runtime.graphs.positions import Positions, computed
from vlmport.runtime.graphs.sessions import DTYPES, return_freed_memory
from vlmport.runtime.layouts.base import Cache, LayoutGraphs
from vlmport.runtime.layouts.golden import (
    Feeds,
    GoldenPrompt,
    GoldenRun,
    check_fits,
    golden_image,
    length_faults,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

CONFIG = "genai_config.json"
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

    @cached_property
    def pad_token_id(self) -> int:
        """The id that the client masks in a prompt. Raises BundleError if its file has none."""
        path = self.bundle.path(CONFIG)
        found = load_json(path, error=BundleError).get("model", {}).get("pad_token_id")
        if not isinstance(found, int):
            raise BundleError(
                f"{path}: model.pad_token_id is {found!r}, expected an id",
                hint="export the bundle again",
                code="bundle.no-pad-token",
            )
        return found

    def process_image(
        self, rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
    ) -> ProcessedImage:
        """Process one image as the runtime does. Raises as `Components.process_image` does."""
        options = {**self.manifest.image_options, **(options or {})}
        return process_image(self.session(IMAGE), rgb, options)

    def encode(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D·(1+n)"]:
        """Encode one image or several, given as the vision graph's inputs by name."""
        return self.run(VISION, inputs)["image_features"]

    def embed(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T D·(1+n)"] | None = None
    ) -> Float[np.ndarray, "S D·(1+n)"]:
        """Embed token ids, with the features in the rows of image tokens.

        Raises PromptError for an id outside the vocabulary, or where the numbers of image tokens
        and features differ.
        """
        if features is None:
            width = self.session(EMBEDDING).get_outputs()[0].shape[-1]
            features = np.zeros((0, width), np.float32)
        feeds = {"input_ids": self.checked(ids, EMBEDDING)[None], "image_features": features}
        return self.run(EMBEDDING, feeds)["inputs_embeds"][0]

    def positions(
        self, ids: Int[np.ndarray, " S"], images: Sequence[Mapping[str, np.ndarray]]
    ) -> Positions:
        """Compute a prompt's positions as onnxruntime-genai does: by the graph, except that
        padding is at position 0 and does not count."""
        kept = ids != self.pad_token_id
        found = computed(self.session(POSITIONS), ids[kept], images, POSITIONS)
        if kept.all():
            return found
        places = np.zeros((*found.ids.shape[:-1], len(ids)), np.int64)
        places[..., kept] = found.ids
        return Positions(places, found.rope_delta - int(np.sum(~kept)))

    def decode(
        self,
        embeds: Float[np.ndarray, "S D·(1+n)"],
        positions: Int[np.ndarray, "... S"],
        cache: Cache | None = None,
        prompt_ids: Int[np.ndarray, " N"] | None = None,
    ) -> tuple[Float[np.ndarray, " V"], Cache]:
        """Run the decoder; return float32 logits of the last row, and the grown cache.

        Args:
            positions: on as many axes as the decoder takes.
            prompt_ids: ids of the whole prompt. As in the client, padding is masked while the
                prompt is read, and not in the steps after it.
        """
        cache = self._no_cache() if cache is None else cache
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((1, past + len(embeds)), np.int64)
        if prompt_ids is not None and past < len(prompt_ids):
            read = prompt_ids[: mask.shape[1]]
            mask[0, : len(read)] = read != self.pad_token_id
        feeds = {
            "inputs_embeds": embeds[None],
            "attention_mask": mask,
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
        prompt_ids: Int[np.ndarray, " P"] | None = None,
    ) -> tuple[list[int], Float[np.ndarray, "n V"]]:
        """Generate the most likely tokens up to and including a stop token, and their logits.

        An image token that the model generates ends the answer, because no image belongs to it.

        Args:
            prompt_ids: as in `decode`.
        """
        ends = {*stop_token_ids, self.manifest.prompt.image_token_id}
        logits, cache = self.decode(embeds, positions.ids, None, prompt_ids)
        rows, tokens = [logits], [int(logits.argmax())]
        while tokens[-1] not in ends and len(tokens) < max_new_tokens:
            at = len(embeds) + len(tokens) - 1 + positions.rope_delta
            step = np.full((*positions.ids.shape[:-1], 1), at, np.int64)
            embedded = self.embed(np.array(tokens[-1:]))
            logits, cache = self.decode(embedded, step, cache, prompt_ids)
            rows.append(logits)
            tokens.append(int(logits.argmax()))
        return tokens, np.stack(rows)


def golden_run(graphs: GenaiGraphs, golden: Golden, new_tokens: int) -> GoldenRun:
    """Run the golden input, and generate greedily, past any stop token."""
    prompt = _golden_prompt(graphs, golden)
    length = len(prompt.ids)
    check_fits(graphs, length + new_tokens - 1)
    faults = length_faults(golden, length, f"prompt has {length} tokens")
    tokens, logits = graphs.greedy(
        prompt.embeds, prompt.positions, new_tokens, prompt_ids=prompt.ids
    )
    return GoldenRun(length, tuple(tokens), logits, faults)


def golden_feeds(graphs: GenaiGraphs, golden: Golden) -> Feeds:
    """Yield the golden input at each graph."""
    vision = graphs.process_image(golden_image(golden), golden.options).inputs
    prompt = _golden_prompt(graphs, golden)
    graphs.close()  # the wide graphs take its place in memory
    yield VISION, vision
    yield (
        DECODER,
        {
            "inputs_embeds": prompt.embeds[None],
            "attention_mask": np.ones((1, len(prompt.ids)), np.int64),
            "position_ids": prompt.positions.ids[:, None],
        },
    )


def _golden_prompt(graphs: GenaiGraphs, golden: Golden) -> GoldenPrompt:
    """Build the prompt as the client does. Raises BundleError where it is too long."""
    processed = graphs.process_image(golden_image(golden), golden.options)
    check_fits(graphs, golden.copies * len(processed.prompt_ids))
    features = np.tile(graphs.encode(processed.inputs), (golden.copies, 1))
    graphs.release(VISION)  # the decoder takes its place in memory
    return_freed_memory()
    ids = np.tile(processed.prompt_ids, golden.copies)
    positions = graphs.positions(ids, [processed.inputs] * golden.copies)
    return GoldenPrompt(ids, graphs.embed(ids, features), positions)
