"""VLM.generate says what transformers' own pipeline says: processor, model.generate, tokenizer.

The ladder compares step by step, on embeddings; here both sides get messages and pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.idefics3_checkpoints import TEMPLATE, write_idefics3_checkpoint
from vlmport.exporter import export
from vlmport.runtime.model import VLM

IMAGE = {"type": "image"}
TOKENS = 12
MODELS = {
    "idefics3": transformers.Idefics3ForConditionalGeneration,
    "smolvlm": transformers.SmolVLMForConditionalGeneration,
}

Sides = tuple[VLM, Callable[..., list[int]]]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module", params=MODELS)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Ours, and a function that gives theirs."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_idefics3_checkpoint(folder / "checkpoint", model_type=request.param)
    bundle = export(checkpoint, folder / "bundle", precisions="fp32")
    model = MODELS[request.param].from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil.from_pretrained(checkpoint),
        transformers.AutoTokenizer.from_pretrained(checkpoint),
        image_seq_len=4,
        chat_template=TEMPLATE,
    )

    def theirs(messages: Any, pictures: list[Image.Image], split: bool) -> list[int]:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        shown = {"images": [pictures], "do_image_splitting": split} if pictures else {}
        inputs = processor(text=prompt, return_tensors="pt", **shown)
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    return VLM.open(bundle, threads=1), theirs


CONVERSATIONS: dict[str, tuple[list[Any], list[tuple[int, int]]]] = {
    "a question": ([{"role": "user", "content": [IMAGE, text("What?")]}], [(60, 41)]),
    "two pictures": (
        [{"role": "user", "content": [text("See"), IMAGE, text("and"), IMAGE]}],
        [(300, 20), (31, 90)],
    ),
    "turns": (
        [
            {"role": "system", "content": [text("Be brief.")]},
            {"role": "user", "content": [IMAGE, text("What?")]},
            {"role": "assistant", "content": [text("2 dogs.\n\n")]},
            {"role": "user", "content": [text("And here?"), IMAGE]},
        ],
        [(1, 1), (17, 51)],
    ),
    "text alone": ([{"role": "user", "content": [text("Why is the sky blue?")]}], []),
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_same_tokens(sides: Sides, name: str, split: bool) -> None:
    model, theirs = sides
    messages, sizes = CONVERSATIONS[name]
    pictures = [picture(*size) for size in sizes]
    options = {"do_image_splitting": split}
    answer = model.generate(messages, pictures, image_options=options, max_new_tokens=TOKENS)
    assert list(answer.token_ids) == theirs(messages, pictures, split)
    assert len(set(answer.token_ids)) > 2
