"""The built-in models in the layouts beside the Hub's: right answers, the runtime's tokens.

The ladders of these layouts climb them in `make verify-all`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.qwen_layouts.conftest import Model
from tests.qwen_layouts.test_fused_decode import example
from tests.qwen_layouts.test_genai_client import Client, given
from tests.shapes_qwen import (
    CAPTIONS,
    EXAMPLES,
    KNOWN,
    MODELS,
    QUESTIONS,
    asked,
    kind,
)
from vlmport.builtin import builtin_models
from vlmport.layouts import ImageSize
from vlmport.runtime.model import VLM

__all__ = ["example"]  # a fixture

CAPTION = "Describe this image."


class Trained(Model):
    """A built-in model and its bundles."""

    @cached_property
    def checkpoint(self) -> Path:
        return builtin_models()[self.folder.name]

    @property
    def size(self) -> ImageSize:
        return ImageSize(144, 144)  # what the Hub's layout makes of each example


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(kind(request.param), tmp_path_factory.mktemp("trained") / request.param)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8"])
def test_fused(trained: Trained, example: ModuleType, precision: str) -> None:
    """The example's loop over two graphs, at a size that all pictures are brought to."""
    asker = example.Asker(trained.fused.folder, precision)
    for name, caption in CAPTIONS.items():
        assert asker.ask(Image.open(EXAMPLES / name), CAPTION) == caption
    for one in KNOWN:
        assert asker.ask(Image.open(EXAMPLES / one["images"][0]), one["question"]) == one["answer"]


def test_fused_has_the_runtimes_tokens(trained: Trained, example: ModuleType) -> None:
    asker = example.Asker(trained.fused.folder, "fp32")
    with VLM.open(trained.hub, precision="fp32") as vlm:
        for name in CAPTIONS:
            tokens = asker.generate(Image.open(EXAMPLES / name), CAPTION)
            assert tokens == list(vlm.caption(EXAMPLES / name).token_ids)


def test_onnxruntime_genai(trained: Trained) -> None:
    """Our own pixels: the runtime's tokens, of captions and of questions about one and two."""
    client = Client(trained.genai.folder)
    with VLM.open(trained.hub, precision="fp32") as vlm:
        captions = [{"images": [name], "question": CAPTION} for name in CAPTIONS]
        for one in [*captions, *QUESTIONS]:
            messages, paths = asked(one)
            rgb = [np.asarray(Image.open(path)) for path in paths]
            made = [vlm.components.process_image(picture) for picture in rgb]
            text = vlm.prompter.encode(vlm.prompter.render(messages))
            ids = vlm.prompter.splice(text, [picture.prompt_ids for picture in made])
            inputs = given(ids, [dict(picture.inputs) for picture in made])
            answer = vlm.generate(messages, paths)
            tokens = client.generate(inputs, len(answer.token_ids))
            assert tokens == list(answer.token_ids)
            assert one not in KNOWN or answer.text == one["answer"]
