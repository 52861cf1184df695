"""Measure how far two results are apart, as plain numbers from numpy arrays.

`ours` comes from the bundle, `truth` from the reference. S positions, V vocabulary, T image
tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

BLOCK = 32  # values of a row that share a scale
NEAR_TIE = 0.03  # logits: float16 was seen to move one token's lead over another by 0.013


def unequal(ours: Shaped[np.ndarray, ...], truth: Shaped[np.ndarray, ...]) -> int:
    """Count the elements that differ; all of the truth's where the shapes differ."""
    if ours.shape != truth.shape:
        return max(1, truth.size)
    return int(np.sum(~((ours == truth) | (np.isnan(ours) & np.isnan(truth)))))


def largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN where one is NaN, which Python's `max` may pass over."""
    return float(np.max([*values]))


def least(values: Iterable[float]) -> float:
    """Return the least value, or NaN where one is NaN."""
    return float(np.min([*values]))


def max_error(ours: Float[np.ndarray, ...], truth: Float[np.ndarray, ...]) -> float:
    """Return the largest absolute difference; infinite where the shapes differ."""
    if ours.shape != truth.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - truth).max(initial=0.0))


def worst_error(ours: Float[np.ndarray, ...], truth: Float[np.ndarray, ...]) -> float:
    """Return the largest absolute difference in standard deviations of the truth."""
    return max_error(ours, truth) / _spread(truth)


def typical_error(ours: Float[np.ndarray, ...], truth: Float[np.ndarray, ...]) -> float:
    """Return the root mean square of the differences in standard deviations of the truth."""
    if ours.shape != truth.shape:
        return float("inf")
    squares = (ours.astype(np.float64) - truth) ** 2
    return float(np.sqrt(squares.mean())) / _spread(truth)


def _spread(truth: Float[np.ndarray, ...]) -> float:
    return max(float(truth.std(dtype=np.float64)), 1e-30)


def least_cosine(ours: Float[np.ndarray, "T D"], truth: Float[np.ndarray, "T D"]) -> float:
    """Return the cosine of the row that fits worst; -1 where the shapes differ.

    Two rows of zeros are alike: an embedding has one where a token is padding.
    """
    if ours.shape != truth.shape:
        return -1.0
    a, b = ours.astype(np.float64), truth.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines = np.sum(a * b, axis=-1) / np.maximum(norms, 1e-30)
    empty = ~(a.any(axis=-1) | b.any(axis=-1))
    return float(np.where(empty, 1.0, cosines).min(initial=1.0))


def rounding_steps(
    ours: Float[np.ndarray, "T D"], truth: Float[np.ndarray, "T D"], bits: int, block: int = BLOCK
) -> float:
    """Return the largest difference in steps of the truth's own block of `block` values of a row.

    A step is that of symmetric rounding to `bits` bits: the largest value of the block divided by
    2^(bits-1). Infinite where the shapes differ, or where a block of zeros is not zero in ours.
    """
    if ours.shape != truth.shape:
        return float("inf")
    pad = ((0, 0), (0, -truth.shape[1] % block))
    error = np.pad(np.abs(ours.astype(np.float64) - truth), pad).reshape(-1, block).max(-1)
    step = np.pad(np.abs(truth), pad).reshape(-1, block).max(-1) / 2 ** (bits - 1)
    steps = np.divide(error, step, out=np.where(error == 0, 0, np.inf), where=step > 0)
    return float(steps.max(initial=0))


def log_softmax(logits: Float[np.ndarray, "S V"]) -> Float[np.ndarray, "S V"]:
    """Return log-probabilities in nats, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def mean_divergence(ours: Float[np.ndarray, "S V"], truth: Float[np.ndarray, "S V"]) -> float:
    """Return the mean over positions of KL(truth ‖ ours) of the next token, in nats."""
    if ours.shape != truth.shape:
        return float("inf")
    p, q = log_softmax(truth), log_softmax(ours)
    return float(np.sum(np.exp(p) * (p - q), axis=-1).mean())


def agreement(ours: Float[np.ndarray, "S V"], truth: Float[np.ndarray, "S V"]) -> float:
    """Return the share of positions at which ours chooses the truth's most likely token.

    A token counts too whose logit in the truth is less by NEAR_TIE at most."""
    if ours.shape != truth.shape:
        return 0.0
    chosen = np.take_along_axis(truth, ours.argmax(-1)[:, None], axis=-1)[:, 0]
    known = ~np.isnan(ours).any(-1)
    return float(((truth.max(-1) - chosen <= NEAR_TIE) & known).mean())


def regret(tokens: Int[np.ndarray, " S"], truth: Float[np.ndarray, "S V"]) -> float:
    """Return by how many nats a token the truth finds these less likely than its own choices.

    `truth` has its logits after the same earlier tokens. 0 where every token is its first choice.
    """
    if len(tokens) != len(truth):
        return float("inf")
    log_p = log_softmax(truth)
    return float((log_p.max(-1) - log_p[np.arange(len(tokens)), tokens]).mean())


def end_regret(logits: Float[np.ndarray, " V"], stop_token_ids: Collection[int]) -> float:
    """Return by how many nats the truth finds an end of the text less likely than its own choice.

    0 where its choice is a stop token, infinite where there is no stop token.
    """
    stops = [token for token in stop_token_ids if token < len(logits)]
    if not stops:
        return float("inf")
    log_p = log_softmax(logits[None])[0]
    return float(log_p.max() - log_p[stops].max())


def margin(logits: Float[np.ndarray, " V"]) -> float:
    """Return the lead of the most likely token over the second, in logits."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)
