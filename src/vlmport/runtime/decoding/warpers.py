"""Options that narrow the tokens to sample from: temperature, top-k, top-p and the like.

They apply to sampling only. Each keeps at least the best `keep` tokens, so that beam sampling
always finds one that is not a stop token. If several tokens are equal at the edge of the kept ones,
those with the lowest ids are kept (torch takes any; top-k keeps all of them, as torch's does).

Sums are exact to float64 and rounded to float32 once. Source: transformers 5.23,
generation/logits_process.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.score_rows import FORBIDDEN, best, log_softmax, softmax

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

    Scores = Float32[np.ndarray, " V"]

Warper = Callable[["Scores"], "Scores"]
ENTROPY_TOKENS = 100  # number of tokens that top_h looks at
FIRST_NUCLEUS = 256  # number of tokens that top_p looks at first


def new_warpers(options: GenerationOptions, keep: int) -> list[Warper]:
    """Make the warpers that the options ask for, in the order of Hugging Face's `generate`."""
    o = options
    warpers: list[Warper] = []
    if o.temperature != 1:
        warpers.append(temperature(o.temperature))
    if o.top_h is not None:
        warpers.append(top_h(o.top_h))
    if o.top_k:
        warpers.append(top_k(max(o.top_k, keep)))
    if o.top_p < 1:
        warpers.append(top_p(o.top_p, keep))
    if o.min_p is not None:
        warpers.append(min_p(o.min_p, keep))
    if o.typical_p < 1:
        warpers.append(typical_p(o.typical_p, keep))
    if o.epsilon_cutoff:
        warpers.append(epsilon_cutoff(o.epsilon_cutoff, keep))
    if o.eta_cutoff:
        warpers.append(eta_cutoff(o.eta_cutoff, keep))
    return warpers


def temperature(value: float) -> Warper:
    """Divide the scores; below 1 the best tokens get even more likely."""
    divisor = np.float32(value)

    def warp(scores: Scores) -> Scores:
        scores /= divisor
        return scores

    return warp


def top_k(count: int) -> Warper:
    """Keep the `count` best tokens, and those equal to the last of them."""

    def warp(scores: Scores) -> Scores:
        if count < len(scores):
            edge = np.partition(scores, len(scores) - count)[len(scores) - count]
            scores[scores < edge] = FORBIDDEN
        return scores

    return warp


def top_p(part: float, keep: int) -> Warper:
    """Keep the fewest best tokens whose probabilities reach `part`.

    A token is dropped if it and all less likely ones sum to at most 1 - part, summed from the least
    likely on.
    """
    rest = np.float32(1 - part)

    def warp(scores: Scores) -> Scores:
        left = np.flatnonzero(scores > FORBIDDEN)
        if len(left) <= keep:
            return scores
        probabilities = softmax(scores[left])
        count = FIRST_NUCLEUS
        while True:  # look at the best only: all others are dropped anyway
            order = best(scores[left], count)
            others = _sum_without(probabilities, order)
            if np.float32(others) <= rest:
                break
            count *= 8
        nucleus = probabilities[order].astype(np.float64)
        upwards = (others + np.cumsum(nucleus[::-1]))[::-1]
        kept = max(int((upwards.astype(np.float32) > rest).sum()), keep)
        return _only(scores, left[order[:kept]])

    return warp


def min_p(part: float, keep: int) -> Warper:
    """Keep tokens with at least `part` of the best token's probability."""
    factor = np.float32(part)

    def warp(scores: Scores) -> Scores:
        left = np.flatnonzero(scores > FORBIDDEN)
        if len(left) <= keep:
            return scores
        probabilities = softmax(scores[left])
        enough = probabilities >= factor * probabilities.max()
        enough[best(scores[left], keep)] = True
        return _only(scores, left[enough])

    return warp


def typical_p(mass: float, keep: int) -> Warper:
    """Keep the tokens whose surprise is nearest to the mean surprise, `mass` of probability."""

    def warp(scores: Scores) -> Scores:
        left = np.flatnonzero(scores > FORBIDDEN)
        if len(left) <= keep:
            return scores
        surprise = -log_softmax(scores[left])
        probabilities = np.exp(-surprise.astype(np.float64)).astype(np.float32)
        mean = np.float32((surprise * probabilities).astype(np.float64).sum())
        oddness = np.abs(surprise - mean)
        order = np.argsort(oddness, kind="stable")
        reached = np.cumsum(softmax(scores[left])[order].astype(np.float64)).astype(np.float32)
        last = min(int((reached < np.float32(mass)).sum()), len(left) - 1)
        typical = oddness[order] <= oddness[order[last]]
        typical[:keep] = True
        return _only(scores, left[order[typical]])

    return warp


def epsilon_cutoff(epsilon: float, keep: int) -> Warper:
    """Keep tokens with at least this probability."""
    least = np.float32(epsilon)
    return lambda scores: _cut(scores, keep, lambda _: least)


def eta_cutoff(epsilon: float, keep: int) -> Warper:
    """Keep tokens with at least the probability min(epsilon, sqrt(epsilon) · exp(-entropy))."""
    least = np.float32(epsilon)

    def eta(probabilities: Float32[np.ndarray, " N"]) -> np.float32:
        narrow = np.float32(np.exp(-float(_entropy(probabilities))))
        return min(least, np.sqrt(least) * narrow)

    return lambda scores: _cut(scores, keep, eta)


def top_h(part: float) -> Warper:
    """Keep the best of 100 tokens whose entropy terms sum to at most `part` of the entropy."""

    def warp(scores: Scores) -> Scores:
        order = best(scores, min(ENTROPY_TOKENS, len(scores)))
        order = order[scores[order] > FORBIDDEN]
        if not len(order):
            return scores
        probabilities = softmax(scores[order])
        terms = _entropy_terms(probabilities)
        most = np.float32(terms.astype(np.float64).sum()) * np.float32(part)
        within = np.cumsum(terms.astype(np.float64)).astype(np.float32) <= most
        within &= probabilities > 0  # a probability of 0 adds nothing, so it would always be kept
        within[0] = True
        return _only(scores, order[within])

    return warp


def _cut(
    scores: Scores, keep: int, least: Callable[[Float32[np.ndarray, " N"]], np.float32]
) -> Scores:
    """Forbid tokens less likely than `least`, except the `keep` best and their equals."""
    left = np.flatnonzero(scores > FORBIDDEN)
    if len(left) <= keep:
        return scores
    probabilities = softmax(scores[left])
    edge = scores[left[best(scores[left], keep)[-1]]]
    going = (probabilities < least(probabilities)) & (scores[left] < edge)
    scores[left[going]] = FORBIDDEN
    return scores


def _entropy_terms(probabilities: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Compute -p · log(p), which is 0 where p is 0."""
    some = probabilities > 0
    logs = np.log(np.where(some, probabilities, 1).astype(np.float64)).astype(np.float32)
    return -probabilities * logs


def _entropy(probabilities: Float32[np.ndarray, " N"]) -> np.float32:
    return np.float32(_entropy_terms(probabilities).astype(np.float64).sum())


def _sum_without(values: Float32[np.ndarray, " N"], without: Int64[np.ndarray, " M"]) -> float:
    """Sum all values except some, in float64."""
    others = np.ones(len(values), np.bool_)
    others[without] = False
    return float(values[others].astype(np.float64).sum())


def _only(scores: Scores, kept: Int64[np.ndarray, " K"]) -> Scores:
    """Forbid all tokens except some."""
    only = np.full_like(scores, FORBIDDEN)
    only[kept] = scores[kept]
    return only
