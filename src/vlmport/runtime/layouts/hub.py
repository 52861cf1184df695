"""Run the golden input in the layout `hub`, whose cache the runtime owns and so can watch.

Each run must write exactly the positions of the cache that it was fed, and no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Golden
from vlmport.errors import some_names
from vlmport.runtime.graphs.base import IMAGE, POSITIONS
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import DECODER, VISION, Components, merge_image_features
from vlmport.runtime.graphs.sessions import return_freed_memory
from vlmport.runtime.layouts.golden import (
    Feeds,
    GoldenPrompt,
    GoldenRun,
    check_fits,
    golden_image,
    length_faults,
)

if TYPE_CHECKING:
    from jaxtyping import Bool

SPARE = 3  # positions past the end that must stay untouched
UNTOUCHED = 7.5  # fills the buffers; no key or value is this everywhere


def golden_run(components: Components, golden: Golden, new_tokens: int) -> GoldenRun:
    """Run the golden input in a watched cache, and generate greedily, past any stop token."""
    prompt = golden_prompt(components, golden)
    ids = prompt.ids
    for component in (IMAGE, VISION, POSITIONS):  # the decoder takes their place in memory
        components.release(component)
    return_freed_memory()
    faults = [*length_faults(golden, len(ids), f"prompt has {len(ids)} tokens")]
    check_fits(components, len(ids) + new_tokens - 1)
    capacity = len(ids) + new_tokens + SPARE
    cache = KeyValueCache(components.decoder, 2, capacity, capacity)
    for buffer in cache.buffers:
        buffer.fill(UNTOUCHED)
    watch = CacheWatch(cache)
    cache.rope_deltas[0] = prompt.positions.rope_delta
    logits = [cache.prefill(0, prompt.embeds, prompt.positions.ids)[-1].copy()]
    faults += watch.changes(0, len(ids), "the prompt")
    tokens = [int(logits[0].argmax())]
    for step in range(1, new_tokens):
        scores = cache.step(components.embed(np.array([[tokens[-1]]])))
        if not faults:  # later faults follow from the first
            faults += watch.changes(len(ids) + step - 1, len(ids) + step, f"step {step}")
        logits.append(scores[0].copy())
        tokens.append(int(scores[0].argmax()))
    return GoldenRun(len(ids), tuple(tokens), np.stack(logits), tuple(faults))


def golden_feeds(components: Components, golden: Golden) -> Feeds:
    """Yield the golden input at each graph that may contain float16."""
    vision = components.process_image(golden_image(golden), golden.options).inputs
    prompt = golden_prompt(components, golden)
    components.close()  # the wide graphs take its place in memory
    yield VISION, vision
    yield (
        DECODER,
        {
            "inputs_embeds": prompt.embeds[None],
            "attention_mask": np.ones((1, len(prompt.ids)), np.int64),
            "position_ids": prompt.positions.ids[..., None, :],
            "num_logits_to_keep": np.array(0, np.int64),
        },
    )


def golden_prompt(components: Components, golden: Golden) -> GoldenPrompt:
    """Build the golden prompt. Raises BundleError where it is longer than the context."""
    processed = components.process_image(golden_image(golden), golden.options)
    check_fits(components, golden.copies * len(processed.prompt_ids))
    features = components.encode_image(processed.inputs)
    ids = np.tile(processed.prompt_ids, golden.copies)
    token = components.manifest.prompt.image_token_id
    embeds = components.embed(ids[None])[0]
    embeds = merge_image_features(embeds, ids, np.tile(features, (golden.copies, 1)), token)
    positions = components.position_ids(ids, [processed.inputs] * golden.copies)
    return GoldenPrompt(ids, embeds, positions)


class CacheWatch:
    """Finds the positions of a cache's buffers that changed since the last call."""

    def __init__(self, cache: KeyValueCache):
        self.cache = cache
        self._before = [_bits(buffer).copy() for buffer in cache.buffers]

    def changes(self, start: int, stop: int, what: str, *, row: int = 0) -> list[str]:
        """Return faults unless exactly the positions start … stop of `row` changed."""
        stray, unwritten = [], []
        for port, before, buffer in zip(
            self.cache.decoder.ports, self._before, self.cache.buffers, strict=True
        ):
            changed: Bool[np.ndarray, "B K P"] = (before != _bits(buffer)).any(axis=-1)
            fed = np.zeros_like(changed)
            fed[row, :, start:stop] = True
            if (changed & ~fed).any():
                stray.append(port.past)
            if (fed & ~changed).any():
                unwritten.append(port.past)
            before[...] = _bits(buffer)
        faults = [f"{what} also changed other positions of {some_names(stray, 2)}"] * bool(stray)
        return faults + [f"{what} left {some_names(unwritten, 2)} unwritten"] * bool(unwritten)


def _bits(buffer: np.ndarray) -> np.ndarray:
    """View the buffer as integers, because NaN is unequal to itself."""
    return buffer.view(f"u{buffer.itemsize}")
