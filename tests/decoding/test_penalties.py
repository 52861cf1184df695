"""OpenAI's presence and frequency penalties, which Hugging Face's `generate` does not have."""

from __future__ import annotations

import numpy as np
import pytest

from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import new_processors


def processed(tokens: tuple[int, ...], **options: float) -> np.ndarray:
    processors = new_processors(
        GenerationOptions.of(options),
        prompt_ids=(1, 1, 2),
        processors_see_prompt=True,
        stop_token_ids=frozenset({0}),
        max_new_tokens=9,
        vocab_size=6,
        mask=None,
    )
    return processors(np.array([0.5, -1, 2, 0, 4, 1], np.float32), tokens)


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, -1.5), (-2, 2), (1.25, 0.3)])
def test_scores_are_those_of_openai(presence: float, frequency: float) -> None:
    """mu[j] - c[j] * frequency - float(c[j] > 0) * presence, with c the counts in the answer."""
    tokens = (4, 3, 4, 4, 1)
    counts = np.array([0, 1, 0, 1, 3, 0], np.float32)
    before = np.array([0.5, -1, 2, 0, 4, 1], np.float32)
    expected = before - counts * np.float32(frequency) - (counts > 0) * np.float32(presence)
    found = processed(tokens, presence_penalty=presence, frequency_penalty=frequency)
    assert np.allclose(found, expected, rtol=0, atol=1e-6)
    assert not np.array_equal(found, before)


def test_tokens_of_the_prompt_are_not_counted() -> None:
    assert np.array_equal(processed((), presence_penalty=2, frequency_penalty=2), processed(()))
