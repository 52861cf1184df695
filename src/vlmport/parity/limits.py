"""What each rung measures, and how far off it may be.

Two judgements: `EXACT` for fp32, where the bundle must compute what the reference computes, up
to the order of float32 sums; `HALF`, `EIGHT_BITS` and `FOUR_BITS` for the others, where numbers
were rounded on purpose and the question is whether the model still says the same. Preprocessing,
prompt, positions and stop ids are never rounded, so they are exact in all.

The reasons stand beside the numbers; docs/verification.md gives the measured values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

# Of the layout `components`, whose files these are.
FOUR_FILES_RUNGS = (
    "pixels",
    "hidden_states",
    "pooler_output",
    "projected_prefix",
    "embeddings",
    "first_logits",
    "prompted_logits",
    "cached_decode",
    "greedy_tokens",
    "end_to_end",
)

# Of the layout `fused`; those of `genai` are the Hub's.
FUSED_RUNGS = (
    "pixels",
    "vision_features",
    "embeddings",
    "first_logits",
    "padded_logits",
    "greedy_tokens",
    "end_to_end",
)

# Before any of them: of a component at a precision that is not fp32, not of a picture.
WEIGHTS_RUNG = "weights"

# From the bottom up, whichever ladder a report is of.
ORDER = (
    WEIGHTS_RUNG,
    "prompt_ids",
    "pixels",
    "vision_features",
    "hidden_states",
    "pooler_output",
    "projected_prefix",
    "embeddings",
    "merged_embeds",
    "position_ids",
    "first_logits",
    "prompted_logits",
    "padded_logits",
    "cached_decode",
    "greedy_tokens",
    "end_to_end",
)

# For the reader of a report whose first broken rung this is.
LIKELY_CAUSES = {
    "weights": "how this precision's weights were rounded, packed or written: in fp32 they are "
    "others",
    "prompt_ids": "the image processor emits other ids for a picture, or another number of them; "
    "or the manifest's image_token_id is wrong",
    "pixels": "resize filter or its rounding, rescale factor, mean or std, or the channel order",
    "vision_features": "a weight of the vision tower or of the projection, an activation, a norm's "
    "epsilon, or the layer that the features are taken from",
    "hidden_states": "a weight of the vision tower, an activation, a norm's epsilon, or the layer "
    "that the states are taken from",
    "pooler_output": "a weight of the pooling head, its probe, or the order of its heads",
    "projected_prefix": "a weight of the projection, or its activation",
    "embeddings": "the embedding table (rows, order, scale), or the head's where they are tied",
    "prompted_logits": "where prompt ids stand, their embeddings, or the positions after a prefix",
    "padded_logits": "the attention mask, or positions that count padding",
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
# Before it, where fp32 passed.
ROUNDED = (
    "fp32 passed, so the rounding of weights: random ones, never trained, fail at few bits by "
    "nature (verify them in fp32)"
)


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

    def to_json(self) -> dict[str, Any]:
        return {"limit": self.bound, "at_least": self.at_least, "unit": self.unit}


def none_of(what: str, reason: str) -> Limit:
    """A limit of zero things."""
    return Limit(0, what, reason)


# The last bits are those of a division in float32. One matrix scaled by 1.1 is at 0.72 or more.
LEVELS = "each weight was rounded to the nearest level of its block"
SAME_FLOATS = "what is kept in floats is copied, or rounded to float16"
WEIGHTS: Mapping[str, Limit] = {
    "steps": Limit(0.501, "", LEVELS),
    "unequal": none_of("weights", SAME_FLOATS),
}

NOT_FLOATS = "ids and positions are whole numbers"
STOPS = "where a text ends is no matter of rounding"

FIXED: Mapping[str, Mapping[str, Limit]] = {
    "prompt_ids": {"wrong": none_of("ids", NOT_FLOATS)},
    "pixels": {
        "wrong": none_of(
            "values",
            "Pillow resizes in fixed point, and rescaling and normalising are one rounding each",
        )
    },
    "position_ids": {"wrong": none_of("positions", NOT_FLOATS)},
}

# Of 28.8 million values, 16 differed, each by one level. A float32 level is no exact number.
LANCZOS = "the graph has no sine of Pillow's precision: one value in a million rounds otherwise"
LANCZOS_PIXELS: Mapping[str, Limit] = {
    "wrong": Limit(8, "values", LANCZOS),
    "levels": Limit(1.01, "grey levels", LANCZOS),
}

# Measured: float32 noise is at most 1.4e-5 (worst) and 1e-6 (typical), in trained models and up to
# a tower of 12 and a decoder of 30 layers.
SUMS = "float32 sums in another order; single values that a wrong weight moves stand out here"
TYPICAL = "what is slightly wrong everywhere: GELU by tanh or not, a norm's epsilon"
SAME_SUMS = "the same sums, cut elsewhere"
COPIED = "rows are copied, not computed"
TOKENS = "equal logits give equal tokens; a near tie is shown by its margins, not excused"

SAME_NUMBERS: Mapping[str, Limit] = {
    "worst": Limit(1e-4, "std", SUMS),
    "typical": Limit(5e-6, "std", TYPICAL),
}

EXACT: Mapping[str, Mapping[str, Limit]] = {
    **FIXED,
    "vision_features": SAME_NUMBERS,
    "merged_embeds": {"wrong": none_of("values", COPIED)},
    "first_logits": SAME_NUMBERS,
    "cached_decode": {
        **SAME_NUMBERS,
        "self": Limit(1e-4, "std", SAME_SUMS),
        "bound": Limit(1e-4, "std", SAME_SUMS),
    },
    "greedy_tokens": {
        "wrong": none_of("tokens", TOKENS),
        "stop ids": none_of("stop ids", STOPS),
    },
    "end_to_end": {
        "wrong": none_of("tokens", TOKENS),
        "prompt": none_of("prompt tokens", NOT_FLOATS),
    },
}

# Measured on two captioners that were trained on drawn shapes, at 4 bits: KL up to 0.009 nats,
# agreement 0.89 (8 of 9 tokens) or more, regret up to 0.05. With one decoder matrix mixed up: KL
# from 0.3 to 1.4 nats, regret from 0.7 to 6. Random weights say nothing: each may cost as much.
ROWS = "8 bits leave the worst row at 0.9985 or more; 4 bits at 0.94 to 0.992"
TOWER = "8 bits cost up to 0.013 std; 4 bits, or one matrix of many scaled by 1.2, 0.05 to 0.18"
STEPS = (
    "rounding is off by half a step of its block, by a whole one where the top level has no twin"
)
DIVERGENCE = "one matrix of the decoder unpacked in another order costs 0.3 nats or more"
AGREEMENT = "near ties may flip, one token in five may not"
REGRET = "other words may be as good: what counts is how likely the reference finds them"
SAME_ROWS = (
    "each row of activations is rounded by itself, so chunks round alike but for ties: 1e-6 nats. "
    "Steps whose positions restart cost 0.07 in a trained model, a cache of another row 1.4"
)
OTHER_ROWS = (
    "q8 scales activations by all rows of a call, so chunks round otherwise: 0.001 nats. Caches of "
    "two layers exchanged cost 0.1 in a random model, 1.5 in a trained one"
)

# float16 keeps 11 bits of each value: measured 4e-7 nats on the same captioners.
HALF_BITS = "float16 keeps 11 bits, so what is off by more was computed otherwise"


def _judged(
    features: Mapping[str, Limit],
    embeds: Mapping[str, Limit],
    kl: Limit,
    top1: Limit,
    steps: Limit,
    regret: Limit,
) -> Mapping[str, Mapping[str, Limit]]:
    """Limits on meaning; prompt, pixels, positions and stop ids stay exact."""
    return {
        **FIXED,
        "vision_features": features,
        "merged_embeds": {
            **embeds,
            "wrong features": none_of("feature values", COPIED),
        },
        "first_logits": {"kl": kl, "top1": top1},
        "cached_decode": {"kl": kl, "self kl": steps, "bound kl": steps},
        "greedy_tokens": {"regret": regret, "stop ids": none_of("stop ids", STOPS)},
        "end_to_end": {"regret": regret, "prompt": none_of("prompt tokens", NOT_FLOATS)},
    }


def _rounded(bits: int, steps: Limit) -> Mapping[str, Mapping[str, Limit]]:
    """q8, q4 and q4f16: the tower has 8 bits in each of them, the embedding `bits`."""
    return _judged(
        features={
            "cosine": Limit(0.997, "", ROWS, at_least=True),
            "typical": Limit(0.04, "std", TOWER),
        },
        embeds={f"{bits} bits": Limit(1.02, "steps", STEPS)},
        kl=Limit(0.2, "nats", DIVERGENCE),
        top1=Limit(0.8, "", AGREEMENT, at_least=True),
        steps=steps,
        regret=Limit(0.3, "nats a token", REGRET),
    )


EIGHT_BITS = _rounded(8, Limit(0.05, "nats", OTHER_ROWS))
FOUR_BITS = _rounded(4, Limit(1e-3, "nats", SAME_ROWS))
HALF = _judged(
    features={"cosine": Limit(0.9999, "", HALF_BITS, at_least=True)},
    embeds={"cosine": Limit(0.9999, "", HALF_BITS, at_least=True)},
    kl=Limit(1e-3, "nats", HALF_BITS),
    top1=Limit(0.95, "", HALF_BITS, at_least=True),
    steps=Limit(1e-3, "nats", HALF_BITS),
    regret=Limit(0.01, "nats a token", HALF_BITS),
)
LIMITS = {"fp32": EXACT, "fp16": HALF, "q8": EIGHT_BITS, "q4": FOUR_BITS, "q4f16": FOUR_BITS}


def limits_of(precision: str, resample: str = "bicubic") -> Mapping[str, Mapping[str, Limit]]:
    """Rung → measure → limit, for a precision and the filter that pictures are resized with.

    A mix of precisions is judged as the coarsest.
    """
    limits = LIMITS.get(precision, FOUR_BITS)
    return {**limits, "pixels": LANCZOS_PIXELS} if resample == "lanczos" else limits


# The pooling head, of which nothing is read here, has 4 bits wherever the tower has integers.
POOLED = (
    "4 bits leave 0.986 at SigLIP's size and 0.992 in a tiny head; a matrix of zeros 0.85, one "
    "unpacked in another order 0.83 or less"
)
TIED = "half a step of a row's 64 where the embedding is the head's matrix"
ROUNDED_HEAD = {"cosine": Limit(0.97, "", POOLED, at_least=True)}
EIGHT_BIT_ROWS = {"7 bits": Limit(0.52, "steps of a row", TIED)}


def fused_limits_of(precision: str, resample: str = "bicubic") -> Mapping[str, Mapping[str, Limit]]:
    """The same numbers for the rungs of the layout `fused`."""
    hub = limits_of(precision, resample)
    embeds = {name: one for name, one in hub["merged_embeds"].items() if name != "wrong features"}
    return {
        "pixels": hub["pixels"],
        "vision_features": hub["vision_features"],
        "embeddings": EIGHT_BIT_ROWS if precision == "q8" else embeds,
        "first_logits": hub["first_logits"],
        "padded_logits": hub["first_logits"],
        "greedy_tokens": hub["greedy_tokens"],
        "end_to_end": hub["end_to_end"],
    }


def genai_limits_of(precision: str, resample: str = "bicubic") -> Mapping[str, Mapping[str, Limit]]:
    """The same numbers for the layout `genai`, whose decoder gives one row of logits a run."""
    hub = limits_of(precision, resample)
    return {
        **hub,
        "first_logits": _without_agreement(hub["first_logits"]),
        "cached_decode": _without_bound(hub["cached_decode"]),
    }


def _without_agreement(limits: Mapping[str, Limit]) -> dict[str, Limit]:
    """Of one position: a near tie would decide about agreement alone."""
    return {name: one for name, one in limits.items() if name != "top1"}


def _without_bound(limits: Mapping[str, Limit]) -> dict[str, Limit]:
    """Without those of the runtime's own cache."""
    return {name: one for name, one in limits.items() if not name.startswith("bound")}


def four_files_limits_of(
    precision: str, resample: str = "bicubic"
) -> Mapping[str, Mapping[str, Limit]]:
    """The same numbers for the rungs of the layout `components`."""
    hub = limits_of(precision, resample)
    vision, logits = hub["vision_features"], hub["first_logits"]
    embeds = {name: one for name, one in hub["merged_embeds"].items() if name != "wrong features"}
    return {
        "pixels": hub["pixels"],
        "hidden_states": vision,
        "pooler_output": vision if precision in ("fp32", "fp16") else ROUNDED_HEAD,
        "projected_prefix": vision,
        "embeddings": EIGHT_BIT_ROWS if precision == "q8" else embeds,
        "first_logits": _without_agreement(logits),
        "prompted_logits": logits,
        "cached_decode": _without_bound(hub["cached_decode"]),
        "greedy_tokens": hub["greedy_tokens"],
        "end_to_end": {name: one for name, one in hub["end_to_end"].items() if name != "prompt"},
    }
