"""Prompt-lookup speculation: guess that the text goes on as it did before.

What followed the same last few tokens earlier, in the prompt or in the text itself, is fed to the
decoder together with the last token. One call then gives the logits of several positions; the
search chooses at each as it always does, and the first choice that differs from the guess is the
last that counts. So the tokens are those of a decode without guesses, whatever the options.

Source: transformers 5.23, PromptLookupCandidateGenerator.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int64


def look_up(
    ids: Int64[np.ndarray, " n"], count: int, max_ngram: int, *, until: Collection[int] = ()
) -> list[int]:
    """Up to `count` ids that followed an earlier occurrence of the last ids; [] for none.

    The longest match of at most `max_ngram` ids counts, and of several the earliest: in a text
    that repeats itself most follows there. The guess ends before an id of `until`.
    """
    for size in range(min(max_ngram, len(ids) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        matches = np.flatnonzero((windows == ids[-size:]).all(axis=1))
        if len(matches):
            start = int(matches[0]) + size
            guess = ids[start : start + count].tolist()
            return guess[: next((i for i, one in enumerate(guess) if one in until), len(guess))]
    return []
