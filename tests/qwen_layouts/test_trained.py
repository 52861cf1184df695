"""The built-in models in the layout `fused`: right answers, the runtime's tokens.

Its ladder climbs them in `make verify-all`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.qwen_layouts.conftest import Model
from tests.qwen_layouts.test_fused_decode import example
from tests.shapes_qwen import CAPTIONS, EXAMPLES, KNOWN, MODELS, kind
from tests.thorough import cells
from vlmport.builtin import builtin_models
from vlmport.bundle.layouts import ImageSize
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


@pytest.mark.parametrize("precision", cells("fp32", rest=("fp16", "q8")))
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
        for name in [*CAPTIONS][:3]:
            tokens = asker.generate(Image.open(EXAMPLES / name), CAPTION)
            assert tokens == list(vlm.caption(EXAMPLES / name).token_ids)
