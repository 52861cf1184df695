"""A real language model's published text through our decoder graph, cache and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runtime.llama import llama_logits, random_tensors, write_llama_bundle
from tests.shared_testdata import shared_testdata
from vlmport.bundle import Bundle
from vlmport.runtime.decoding import new_search
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import Request
from vlmport.runtime.streamed_text import TextStream
from vlmport.text.tokenizer import read_tokenizer

STORIES = shared_testdata("weights", "stories260K")
RANDOM = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def greedy(bundle: Bundle, *prompts: list[int], new_tokens: int) -> list[list[int]]:
    components = Components.open(bundle, threads=1)
    requests = []
    for ids in prompts:
        search = new_search(
            GenerationOptions(),
            prompt_ids=ids,
            processors_see_prompt=True,
            stop_token_ids=(),
            max_new_tokens=new_tokens,
            vocab_size=components.decoder.vocab_size,
        )
        requests.append(Request(components.embed(np.array([ids]))[0], search, new_tokens))
    Generation(components, requests).run()
    return [list(request.tokens) for request in requests]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict]:
    if STORIES is None:
        pytest.skip("no shared test data")
    source = STORIES / "hf-derived"
    raw = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    folder = tmp_path_factory.mktemp("stories")
    bundle = write_llama_bundle(folder, raw, tensors, tokenizer=source / "tokenizer.json")
    return bundle, json.loads((STORIES / "golden_greedy_256.json").read_text())


def test_stories260k_tells_its_published_text(stories: tuple[Bundle, dict]):
    bundle, golden = stories
    ids = golden["greedy_ids"]
    (tokens,) = greedy(bundle, golden["prompt_ids"], new_tokens=256)
    assert tokens == ids[1:257]
    stream = TextStream(read_tokenizer(bundle.folder))
    text = "".join([stream.push(token) for token in ids]) + stream.finish()
    assert text == golden["greedy_text"]


def test_stories260k_goes_on_from_anywhere_in_a_ragged_batch(stories: tuple[Bundle, dict]):
    """Prompts of 1, 50 and 130 tokens of the text, together: each continues it."""
    bundle, golden = stories
    ids = golden["greedy_ids"]
    starts = (1, 50, 130)
    for start, tokens in zip(
        starts, greedy(bundle, *(ids[:start] for start in starts), new_tokens=60), strict=True
    ):
        assert tokens == ids[start : start + 60]


def test_stories260k_first_logits(stories: tuple[Bundle, dict]):
    bundle, golden = stories
    components = Components.open(bundle, threads=1)
    logits, _ = components.decode(
        components.embed(np.array([golden["prompt_ids"]])), np.ones((1, 1)), np.zeros((1, 1))
    )
    np.testing.assert_allclose(logits[0, 0], golden["first_step_logits"], atol=2e-4)


def test_a_random_llama_equals_numpy(tmp_path: Path):
    """The same without the test data: 60 greedy tokens against float64 without a cache."""
    tensors = random_tensors(RANDOM)
    bundle = write_llama_bundle(tmp_path, RANDOM, tensors)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    want = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(60):
            text.append(int(llama_logits(RANDOM, tensors, text)[-1].argmax()))
        want.append(text[len(prompt) :])
    assert len(set(want[0])) > 5
    assert greedy(bundle, *prompts, new_tokens=60) == want
