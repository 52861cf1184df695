"""Prompts of token ids, of unequal length and each with options of its own, in one generation:
every one has what transformers' `generate(input_ids=…)` gives for it alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.runtime.llama import random_tensors, write_llama_bundle
from tests.runtime.test_llama_text import RANDOM
from vlmport.bundle import Bundle
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import Request, new_request

STOP = 7
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 1},
    {"min_length": 20, "max_length": 30},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 0.0},
    {"num_beams": 2, "early_stopping": True, "bad_words_ids": [[3], [4, 5]]},
    {"prompt_lookup_num_tokens": 4, "repetition_penalty": 0.9},
]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Components, Any]:
    """A random llama as a bundle whose processors see the prompt, and in transformers."""
    tensors = random_tensors(RANDOM, seed=2)
    bundle = write_llama_bundle(tmp_path_factory.mktemp("llama"), RANDOM, tensors)
    generation = dataclasses.replace(
        bundle.manifest.generation, processors_see_prompt=True, stop_token_ids=(STOP,)
    )
    manifest = dataclasses.replace(bundle.manifest, generation=generation)
    components = Components.open(Bundle(bundle.folder, manifest), threads=1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**RANDOM, attn_implementation="eager")
    )
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return components, model.eval()


def theirs(model: Any, prompt: list[int], options: dict[str, Any]) -> list[list[int]]:
    settings = transformers.GenerationConfig(
        **{"max_new_tokens": 24, **options} if "max_length" not in options else options,
        eos_token_id=STOP,
        pad_token_id=STOP,
    )
    with torch.no_grad():
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=ids * 0 + 1, generation_config=settings)
    made = output[:, len(prompt) :].tolist()
    return [row[: row.index(STOP) + 1] if STOP in row else row for row in made]


def request_of(components: Components, prompt: list[int], options: dict[str, Any]) -> Request:
    ids = np.array(prompt, np.int64)
    asked = options if "max_length" in options else {"max_new_tokens": 24, **options}
    embeds = components.embed(ids[None])[0]
    return new_request(components, embeds, GenerationOptions(**asked), prompt_ids=ids)


def prompt_of(seed: int) -> list[int]:
    """Of a length of its own; some of its tokens are there twice."""
    rng = np.random.default_rng(seed)
    part = rng.integers(8, RANDOM["vocab_size"], 2 + seed % 5).tolist()
    return part + rng.integers(8, RANDOM["vocab_size"], seed % 3).tolist() + part


def test_all_options_at_once(sides: tuple[Components, Any]):
    components, model = sides
    asked = [(prompt_of(seed), options) for seed, options in enumerate(OPTIONS * 2)]
    requests = [request_of(components, *one) for one in asked]
    generation = Generation(components, requests[:6])
    for request in requests[6:]:  # the others join one by one
        generation.step()
        generation.add(request)
    generation.run()
    texts = set()
    for (prompt, options), request in zip(asked, requests, strict=True):
        ours = [list(answer.tokens) for answer in request.search.results()]
        assert ours == theirs(model, prompt, options), options
        texts.add(tuple(ours[0]))
    assert len(texts) == len(asked)


def test_what_the_prompt_is_changes_what_comes(sides: tuple[Components, Any]):
    """The comparison above can fail: the same embeddings, without their ids."""
    components, _ = sides
    options = GenerationOptions(repetition_penalty=1.5, max_new_tokens=24)
    prompt = prompt_of(4)
    seen = request_of(components, prompt, {"repetition_penalty": 1.5})
    unseen = new_request(components, seen.embeds, options)
    Generation(components, [seen, unseen]).run()
    assert seen.tokens != unseen.tokens
