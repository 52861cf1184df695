"""Tables of logits to decode over, made to be awkward on request."""

from __future__ import annotations

import numpy as np

from tests.decoding.reference import Table


def table(
    seed: int = 0,
    vocab_size: int = 24,
    *,
    rows: int = 61,
    scale: float = 2.0,
    equal: int = 0,
    flat: int = 0,
    forbidden: float = 0.0,
) -> Table:
    """Random logits.

    Args:
        equal: so many columns are copies of others, so that tokens tie.
        flat: so many rows are 0 throughout.
        forbidden: the part of all logits that is -inf; one in each row never is.
    """
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, vocab_size)) * scale
    for _ in range(equal):
        one, other = random.integers(0, vocab_size, 2)
        logits[:, one] = logits[:, other]
    logits[random.permutation(rows)[:flat]] = 0
    out = random.random((rows, vocab_size)) < forbidden
    out[np.arange(rows), random.integers(0, vocab_size, rows)] = False
    logits[out] = -np.inf
    return Table(logits.astype(np.float32))
