"""What each rung measures, and how far off it may be.

Two judgements: `exact` for fp32, where the bundle must compute what the reference computes, up
to the order of float32 sums; `close` for every other precision, where weights were rounded on
purpose and the question is whether the model still says the same. Preprocessing, prompt and
positions are never rounded, so they are exact in both.

The reasons stand beside the numbers; docs/verification.md gives the measured values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RUNGS = (
    "prompt_ids",
    "pixels",
    "vision_features",
    "merged_embeds",
    "position_ids",
    "first_logits",
    "cached_decode",
    "greedy_tokens",
    "end_to_end",
)

# For the reader of a report whose first broken rung this is.
LIKELY_CAUSES = {
    "prompt_ids": "the image processor emits other ids for a picture, or another number of them; "
    "or the manifest's image_token_id is wrong",
    "pixels": "resize filter or its rounding, rescale factor, mean or std, or the channel order",
    "vision_features": "a weight of the vision tower or of the projection, an activation, a norm's "
    "epsilon, or the layer that the features are taken from",
    "merged_embeds": "the embedding table (rows, order, scale), or features written over the "
    "wrong rows",
    "position_ids": "where positions start, or how they go on after a cache",
    "first_logits": "a weight of the decoder, LoRA not merged or merged with another scale, rotary "
    "base or layout, the attention mask, or the head",
    "cached_decode": "cache not fed back, wrong cache names or order, or positions that restart "
    "with each chunk",
    "greedy_tokens": "stop ids, the runtime's cache between steps, or an embedding that decode "
    "steps look up wrongly",
    "end_to_end": "what the runtime adds by itself: template, BOS, the caption's messages, opening "
    "the picture, logits processors",
}


@dataclass(frozen=True)
class Limit:
    """A bound on one measure, and why it stands there."""

    bound: float
    unit: str
    reason: str
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is within it; what is not a number never is."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.unit}".rstrip()


def none_of(what: str, reason: str) -> Limit:
    """A limit of zero things."""
    return Limit(0, what, reason)


FIXED: Mapping[str, Mapping[str, Limit]] = {
    "prompt_ids": {"wrong": none_of("ids", "ids are whole numbers")},
    "pixels": {
        "wrong": none_of(
            "values",
            "Pillow resizes in fixed point, and rescaling and normalising are one rounding each",
        )
    },
    "position_ids": {"wrong": none_of("positions", "positions are whole numbers")},
}

SUMS = "float32 sums in another order give about 5e-6; a wrong activation gives more than 1e-3"
SAME_SUMS = "the same sums, cut elsewhere"
COPIED = "rows are copied, not computed"
TOKENS = "equal logits give equal tokens; a near tie is shown by its margins, not excused"

EXACT: Mapping[str, Mapping[str, Limit]] = FIXED | {
    "vision_features": {"error": Limit(1e-4, "std", SUMS)},
    "merged_embeds": {"wrong": none_of("values", COPIED)},
    "first_logits": {"error": Limit(1e-4, "std", SUMS)},
    "cached_decode": {
        "error": Limit(1e-4, "std", SUMS),
        "self": Limit(1e-4, "std", SAME_SUMS),
    },
    "greedy_tokens": {"wrong": none_of("tokens", TOKENS)},
    "end_to_end": {"wrong": none_of("tokens", TOKENS)},
}

ROUNDED = (
    "rounding blocks of 32 weights to 4 bits costs a row's cosine 0.005, at worst 0.01; a table "
    "with its rows or its zero point shifted is below 0.97"
)
DIVERGENCE = ""
CLOSE: Mapping[str, Mapping[str, Limit]] = FIXED | {
    "vision_features": {"cosine": Limit(0.98, "", ROUNDED, at_least=True)},
    "merged_embeds": {
        "cosine": Limit(0.98, "", ROUNDED, at_least=True),
        "wrong features": none_of("values", COPIED),
    },
    "first_logits": {
        "kl": Limit(0.1, "nats", DIVERGENCE),
        "top1": Limit(0.8, "", DIVERGENCE, at_least=True),
    },
    "cached_decode": {
        "kl": Limit(0.1, "nats", DIVERGENCE),
        "self": Limit(0.1, "std", SAME_SUMS),
    },
    "greedy_tokens": {"regret": Limit(0.1, "nats a token", DIVERGENCE)},
    "end_to_end": {"regret": Limit(0.1, "nats a token", DIVERGENCE)},
}


def limits_of(precision: str) -> Mapping[str, Mapping[str, Limit]]:
    """Rung → measure → limit, for a precision."""
    return EXACT if precision == "fp32" else CLOSE
