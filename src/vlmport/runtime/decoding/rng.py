"""The random stream, and sampling tokens with it.

docs/decoding.md specifies both, so that another language samples the same tokens from the same seed
and scores.

Traps:

- Weights are whole numbers, so their sums are exact in any order. A last bit of `exp` that two
  languages round differently almost never has an effect.
- A state is a tuple, never changed in place: a step that is interrupted samples the same again.

Source: xoshiro128** 1.1 (Blackman and Vigna, public domain), seeded by a 32-bit splitmix.
"""

from __future__ import annotations

import secrets
from bisect import insort
from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.decoding.score_rows import best

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64

State = tuple[int, int, int, int]
WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio, the step of splitmix
WEIGHT = 2.0**32  # of the best token; 2**21 tokens of it still sum exactly in float64
LEAST = 24  # exp(-24) is below 2**-32: scores further below have no weight


def new_seed() -> int:
    """Make an unpredictable seed below 2**32."""
    return secrets.randbits(32)


def stream(seed: int, sequence: int) -> State:
    """Return the first state of a request's n-th stream; each of its sequences has its own."""
    first = 4 * sequence + 1
    a, b, c, d = (_mixed(seed + place * GOLDEN) for place in range(first, first + 4))
    return a, b, c, d


def _mixed(word: int) -> int:
    """Mix 32 bits: each output bit depends on each input bit."""
    word &= WORD
    word = ((word ^ word >> 16) * 0x21F0AAAD) & WORD
    word = ((word ^ word >> 15) * 0x735A2D97) & WORD
    return word ^ word >> 15


def next_word(state: State) -> tuple[int, State]:
    """Return 32 random bits, and the state after them."""
    a, b, c, d = state
    word = (_rotated((b * 5) & WORD, 7) * 9) & WORD
    c, d = c ^ a, d ^ b
    return word, (a ^ d, b ^ c, c ^ (b << 9 & WORD), _rotated(d, 11))


def _rotated(word: int, by: int) -> int:
    return (word << by | word >> 32 - by) & WORD


def uniform(state: State) -> tuple[float, State]:
    """Return a multiple of 2**-53 from 0 to below 1, made of two words, and the state after."""
    high, state = next_word(state)
    low, state = next_word(state)
    return ((high >> 5) * 67108864.0 + (low >> 6)) / 9007199254740992.0, state


def weights(
    scores: Float32[np.ndarray, " V"],
) -> tuple[Int64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Return the indices with a weight, in order, and their weights; one score must be finite.

    Weights are whole numbers in the ratio of exp(score), 2**32 for the best. Tokens less than
    2**-32 as likely as the best have no weight.
    """
    top = scores.max()
    places = np.flatnonzero(scores >= top - np.float32(LEAST))
    weights = np.floor(np.exp(scores[places].astype(np.float64) - float(top)) * WEIGHT)
    return places[weights > 0], weights[weights > 0]


def draw(scores: Float32[np.ndarray, " V"], state: State) -> tuple[int, State]:
    """Sample one index in the ratio of exp(score), with one uniform number."""
    drawn, state = draw_several(scores, 1, state)
    return drawn[0], state


def draw_several(
    scores: Float32[np.ndarray, " V"], count: int, state: State
) -> tuple[list[int], State]:
    """Sample `count` different indices, one after the other, without replacement.

    Each takes one uniform number. When no weight is left, the best scores follow, without numbers.
    """
    places, weighty = weights(scores)
    upto = np.cumsum(weighty)
    total, drawn = float(upto[-1]), []
    gone: list[int] = []  # in order
    while len(drawn) < count and total > 0:
        part, state = uniform(state)
        ahead = float(
            np.floor(part * total)
        )  # the sum of the remaining weights before the sampled one
        for at in gone:
            if upto[at] - weighty[at] <= ahead:
                ahead += weighty[at]
        at = int(np.searchsorted(upto, ahead, side="right"))
        drawn.append(int(places[at]))
        insort(gone, at)
        total -= weighty[at]
    if len(drawn) < count:
        taken = set(drawn)
        order = best(scores, min(len(scores), count + len(drawn)))
        drawn += [one for one in order.tolist() if one not in taken][: count - len(drawn)]
    return drawn, state
