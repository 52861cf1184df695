"""Maths on rows of scores: the best tokens, and probabilities.

Of equal scores, the one with the lowest index counts as the better. Sums of exponentials are
exact to float64 and rounded to float32 once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

FORBIDDEN = np.float32(-np.inf)  # the score of a token that can't be chosen


def best(scores: Float32[np.ndarray, " V"], count: int) -> Int64[np.ndarray, " K"]:
    """Return the indices of the highest scores, highest first; of equals the lowest index first.

    A partition, not a sort: O(V) for a small count.
    """
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")[:count]
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > edge)
    at_edge = np.flatnonzero(scores == edge)[: count - len(above)]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], at_edge])


def log_softmax(scores: Float32[np.ndarray, "... V"]) -> Float32[np.ndarray, "... V"]:
    """Compute log-probabilities. A row of -inf alone stays -inf; a row with NaN or +inf is NaN."""
    top = scores.max(-1, keepdims=True).astype(np.float64)
    none = np.isneginf(top)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = scores - np.where(none, 0, top)
        total = np.log(np.exp(apart).sum(-1, keepdims=True))
    return (apart - np.where(none, 0, total)).astype(np.float32)


def softmax(scores: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Compute probabilities; at least one score must be finite."""
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    return (weights / weights.sum()).astype(np.float32)
