"""Prompt-lookup speculation: draft that the text repeats what came before.

The last few tokens are searched earlier in the prompt and in the answer; the tokens after the match
are a draft, which the decoder reads together with the last token. One call then gives the logits of
several positions. The search chooses at each position as usual, and the first choice that differs
from the draft is the last one that counts. So drafts never change the tokens.

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
    """Return up to `count` ids that followed an earlier occurrence of the last ids; [] for none.

    The longest match of at most `max_ngram` ids is used, and the earliest of several: in a text
    that repeats itself it has the longest continuation. The draft ends before an id of `until`.
    """
    for size in range(min(max_ngram, len(ids) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        matches = np.flatnonzero((windows == ids[-size:]).all(axis=1))
        if len(matches):
            start = int(matches[0]) + size
            draft = ids[start : start + count].tolist()
            return draft[: next((i for i, one in enumerate(draft) if one in until), len(draft))]
    return []
