"""The rungs of the ladders: one comparison each, with its limits and its likely cause.

A rung is found by its name in reports, in vlmport.json and in docs/verification.md. Ladders share
names: `pixels` means the same in all of them, though each has its own way to get there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmport.parity.limits import Limits

Found = tuple[dict[str, float], str | None]  # measure → value, and a detail for the reader

# The rung that compares rounded weights with those of fp32, before any image (rounding.py).
WEIGHTS_RUNG = "weights"

# Rung → where to look when it is the first that breaks. The rungs of all ladders are here, from the
# bottom up: this is their order in reports.
CAUSES: Mapping[str, str] = {
    WEIGHTS_RUNG: "how the weights of this precision were rounded, packed or written: those of "
    "fp32 differ",
    "prompt_ids": "the image processor gives other ids for an image, or another number of them; "
    "or the manifest's image_token_id is wrong",
    "pixels": "resize filter or its rounding, rescale factor, mean or std, or the channel order",
    "vision_features": "a weight of the vision tower or of the projection, an activation, a norm's "
    "epsilon, or the layer that the features are taken from",
    "hidden_states": "a weight of the vision tower, an activation, a norm's epsilon, or the layer "
    "that the states are taken from",
    "pooler_output": "a weight of the pooling head, its probe, or the order of its heads",
    "projected_prefix": "a weight of the projection, or its activation",
    "embeddings": "the embedding table (rows, order, scale), or the head's where they are tied",
    "merged_embeds": "the embedding table (rows, order, scale), or features written over the "
    "wrong rows",
    "position_ids": "the first position, or how positions continue after a cache",
    "first_logits": "a weight of the decoder, LoRA not merged or merged with another scale, rotary "
    "base or layout, the attention mask, or the head",
    "prompted_logits": "the place of prompt ids, their embeddings, or the positions after a prefix",
    "padded_logits": "the attention mask, or positions that count padding",
    "cached_decode": "cache not fed back, wrong cache names or order, or positions that restart "
    "with each chunk",
    "greedy_tokens": "stop ids, the runtime's cache between steps, or an embedding that decode "
    "steps look up wrongly",
    "end_to_end": "what the runtime adds by itself: template, BOS, the caption's messages, opening "
    "the image, logits processors",
}
ORDER = tuple(CAUSES)

# Said before the cause, where fp32 passed.
ROUNDED = (
    "fp32 passed, so the cause is the rounding of weights; weights that are random, not trained, "
    "fail at few bits (verify them with --precision fp32)"
)


@dataclass(frozen=True)
class Rung:
    """One comparison of a ladder.

    Attributes:
        name: its name, a key of CAUSES.
        find: the method of the ladder that compares the bundle with the reference.
        limits: the limits of every measure that counts; `find` may give more.
    """

    name: str
    find: Callable[[Any], Found]
    limits: Limits

    @property
    def cause(self) -> str:
        """The likely cause, where this is the first rung that breaks."""
        return CAUSES[self.name]
