"""Limit how far off each measure of a rung may be, at each precision.

In fp32 the bundle must compute what the reference computes, up to the order of float32 sums. At the
other precisions numbers were rounded on purpose, and the question is whether the model still says
the same. Image ids, pixels, prompts, positions and stop ids are never rounded, so they are exact at
every precision.

Each limit is defined with its reason; docs/verification.md gives the measured values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Limit:
    """A bound on one measure, and the reason for it."""

    bound: float
    unit: str
    reason: str
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bound; NaN never is."""
        return value >= self.bound if self.at_least else value <= self.bound

    def to_json(self) -> dict[str, Any]:
        """Return bound, direction and unit, as in vlmport.json."""
        return {"limit": self.bound, "at_least": self.at_least, "unit": self.unit}


def none_of(what: str, reason: str) -> Limit:
    """Return a limit of zero, with `what` as its unit."""
    return Limit(0, what, reason)


Measures = Mapping[str, Limit]  # measure → limit


@dataclass(frozen=True)
class Limits:
    """The limits of one comparison at every precision.

    Attributes:
        exact: at fp32.
        half: at fp16.
        eight_bits: at q8.
        four_bits: at q4 and q4f16, and at a mix of precisions, which is judged as the coarsest.
        lanczos: at every precision, where images are resized with Lanczos; None for no difference.
    """

    exact: Measures
    half: Measures
    eight_bits: Measures
    four_bits: Measures
    lanczos: Measures | None = None

    @classmethod
    def same(cls, measures: Measures, lanczos: Measures | None = None) -> Self:
        """Create limits that are equal at every precision."""
        return cls(measures, measures, measures, measures, lanczos)

    def at(self, precision: str, resample: str = "bicubic") -> Measures:
        """Return the limits at a precision, for images resized with the filter `resample`."""
        if self.lanczos is not None and resample == "lanczos":
            return self.lanczos
        plain = {"fp32": self.exact, "fp16": self.half, "q8": self.eight_bits}
        return plain.get(precision, self.four_bits)

    def without(self, *names: str) -> Self:
        """Copy these limits without some measures."""

        def fewer(measures: Measures) -> Measures:
            return {name: limit for name, limit in measures.items() if name not in names}

        return dataclasses.replace(
            self,
            exact=fewer(self.exact),
            half=fewer(self.half),
            eight_bits=fewer(self.eight_bits),
            four_bits=fewer(self.four_bits),
        )


# Weights

# The last bits are those of a division in float32. One matrix scaled by 1.1 is at 0.72 or more.
LEVELS = "each weight was rounded to the nearest level of its block"
SAME_FLOATS = "what is kept in floats is copied, or rounded to float16"
WEIGHTS: Measures = {
    "steps": Limit(0.501, "", LEVELS),
    "unequal": none_of("weights", SAME_FLOATS),
}

# Integers and pixels, the same at every precision

NOT_FLOATS = "ids and positions are whole numbers"
PROMPT_IDS = Limits.same({"wrong": none_of("ids", NOT_FLOATS)})
POSITION_IDS = Limits.same({"wrong": none_of("positions", NOT_FLOATS)})

FIXED_POINT = "Pillow resizes in fixed point, and rescaling and normalising are one rounding each"
# Of 28.8 million values, 16 differed, each by one level. A float32 level is no exact number.
LANCZOS = "the graph has no sine of Pillow's precision: one value in a million rounds otherwise"
PIXELS = Limits.same(
    {"wrong": none_of("values", FIXED_POINT)},
    lanczos={
        "wrong": Limit(8, "values", LANCZOS),
        "levels": Limit(1.01, "grey levels", LANCZOS),
    },
)

# fp32. Measured: float32 noise is at most 1.4e-5 (worst) and 1e-6 (typical), in trained models and
# up to a tower of 12 and a decoder of 30 layers.
SUMS = "float32 sums in another order; single values that a wrong weight moves stand out here"
TYPICAL = "what is slightly wrong everywhere: GELU by tanh or not, a norm's epsilon"
SAME_SUMS = "the same sums, cut elsewhere"
COPIED = "rows are copied, not computed"
SAME_TOKENS = "equal logits give equal tokens; a near tie is shown by its margins, not excused"
STOPS = "where a text ends does not depend on rounding"
SAME_NUMBERS: Measures = {
    "worst": Limit(1e-4, "std", SUMS),
    "typical": Limit(5e-6, "std", TYPICAL),
}

# fp16. float16 keeps 11 bits of each value: measured 4e-7 nats on the captioners named below.
HALF_BITS = "float16 keeps 11 bits, so what is off by more was computed otherwise"
HALF_COSINE = {"cosine": Limit(0.9999, "", HALF_BITS, at_least=True)}

# q8, q4 and q4f16: the tower has 8 bits in each of them. Measured on two captioners that were
# trained on drawn shapes, at 4 bits: KL up to 0.009 nats, agreement 0.89 (8 of 9 tokens) or more,
# regret up to 0.05. With one decoder matrix mixed up: KL from 0.3 to 1.4 nats, regret from 0.7 to
# 6. Random weights say nothing: each may cost as much.
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
ROUNDED_FEATURES = {
    "cosine": Limit(0.997, "", ROWS, at_least=True),
    "typical": Limit(0.04, "std", TOWER),
}
ROUNDED_KL = Limit(0.2, "nats", DIVERGENCE)
ROUNDED_LOGITS = {"kl": ROUNDED_KL, "top1": Limit(0.8, "", AGREEMENT, at_least=True)}

FEATURES = Limits(SAME_NUMBERS, HALF_COSINE, ROUNDED_FEATURES, ROUNDED_FEATURES)

LOGITS = Limits(
    SAME_NUMBERS,
    {
        "kl": Limit(1e-3, "nats", HALF_BITS),
        "top1": Limit(0.95, "", HALF_BITS, at_least=True),
    },
    ROUNDED_LOGITS,
    ROUNDED_LOGITS,
)
LAST_LOGITS = LOGITS.without("top1")  # of one position: a near tie alone would decide

MERGED_EMBEDS = Limits(
    {"wrong": none_of("values", COPIED)},
    {**HALF_COSINE, "wrong features": none_of("feature values", COPIED)},
    {"8 bits": Limit(1.02, "steps", STEPS), "wrong features": none_of("feature values", COPIED)},
    {"4 bits": Limit(1.02, "steps", STEPS), "wrong features": none_of("feature values", COPIED)},
)

# An embedding that is cut out of its graph, with the head's matrix where they are tied.
TIED = "half a step of a row's 64 where the embedding is the head's matrix"
EMBEDDINGS = dataclasses.replace(
    MERGED_EMBEDS.without("wrong features"),
    eight_bits={"7 bits": Limit(0.52, "steps of a row", TIED)},
)

# The pooling head, whose output no caption reads, has 4 bits wherever the tower has integers.
POOLED = (
    "4 bits leave 0.986 at SigLIP's size and 0.992 in a tiny head; a matrix of zeros 0.85, one "
    "unpacked in another order 0.83 or less"
)
ROUNDED_HEAD = {"cosine": Limit(0.97, "", POOLED, at_least=True)}
POOLER_OUTPUT = dataclasses.replace(FEATURES, eight_bits=ROUNDED_HEAD, four_bits=ROUNDED_HEAD)


def _cached(kl: Limit, steps: Limit) -> Measures:
    """Return the limits of cached decoding where numbers were rounded."""
    return {"kl": kl, "self kl": steps, "bound kl": steps}


CACHED_DECODE = Limits(
    {
        **SAME_NUMBERS,
        "self": Limit(1e-4, "std", SAME_SUMS),
        "bound": Limit(1e-4, "std", SAME_SUMS),
    },
    _cached(Limit(1e-3, "nats", HALF_BITS), Limit(1e-3, "nats", HALF_BITS)),
    _cached(ROUNDED_KL, Limit(0.05, "nats", OTHER_ROWS)),
    _cached(ROUNDED_KL, Limit(1e-3, "nats", SAME_ROWS)),
)
GROWING_CACHE = CACHED_DECODE.without("bound", "bound kl")  # without the runtime's own cache


def _tokens(other: Measures) -> Limits:
    """Return the limits of generated tokens, with another measure that is never rounded."""
    rounded = {"regret": Limit(0.3, "nats a token", REGRET), **other}
    return Limits(
        {"wrong": none_of("tokens", SAME_TOKENS), **other},
        {"regret": Limit(0.01, "nats a token", HALF_BITS), **other},
        rounded,
        rounded,
    )


GREEDY_TOKENS = _tokens({"stop ids": none_of("stop ids", STOPS)})
END_TO_END = _tokens({"prompt": none_of("prompt tokens", NOT_FLOATS)})
END_WITHOUT_PROMPT = END_TO_END.without("prompt")
