"""Tiny Qwen-VL models in the layouts beside the Hub's, made once; pictures to ask about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import FUSED, GENAI, HUB, ImageSize
from vlmport.exporter import export
from vlmport.parity.asked import Request
from vlmport.parity.pictures import Picture, drawn_pictures
from vlmport.parity.references import load_reference

IMAGE = {"type": "image"}
WRITE: dict[str, Callable[..., Path]] = {"qwen2_5_vl": write_qwen2_5, "qwen3_vl": write_qwen3}
# Wider than high, so that rows and columns can't be mixed up; 24 and 20 tokens.
SIZES = {"qwen2_5_vl": ImageSize(84, 56), "qwen3_vl": ImageSize(80, 64)}
SEEDS = {"qwen2_5_vl": 0, "qwen3_vl": 1}  # of models that do not say one token all along
NEW_TOKENS = 12


def user(*parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": texts}


def drawn(*sizes: tuple[int, int]) -> tuple[Picture, ...]:
    return tuple(drawn_pictures(sizes))


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]}
REQUESTS = {
    "one picture": Request("one picture", drawn((70, 101)), (user(IMAGE, "What is this?"),)),
    "two pictures, two turns": Request(
        "two pictures, two turns",
        drawn((64, 40), (31, 90)),
        (user(IMAGE, "and this?"), ANSWER, user("Or", IMAGE, "here?")),
    ),
    "text alone": Request("text alone", (), (user("Why is the sky blue?"),)),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint and its bundles, not to be changed."""

    kind: str
    folder: Path

    @cached_property
    def checkpoint(self) -> Path:
        settings = {"generation": {"max_new_tokens": NEW_TOKENS}, "seed": SEEDS[self.kind]}
        return WRITE[self.kind](self.folder / "checkpoint", **settings)

    @cached_property
    def reference(self) -> Any:
        token = self.hub.manifest.prompt.image_token_id
        return load_reference(self.checkpoint, image_token_id=token)

    @property
    def size(self) -> ImageSize:
        return SIZES[self.kind]

    @cached_property
    def hub(self) -> Bundle:
        return export(self.checkpoint, self.folder / HUB, precisions="fp32", layout=HUB)

    @cached_property
    def fused(self) -> Bundle:
        return export(
            self.checkpoint,
            self.folder / FUSED,
            precisions="fp32,fp16,q8",
            layout=FUSED,
            image_size=self.size,
        )

    @cached_property
    def genai(self) -> Bundle:
        out, precisions = self.folder / GENAI, "fp32,fp16,q8"
        return export(self.checkpoint, out, precisions=precisions, layout=GENAI)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("qwen-layouts")
    return {kind: Model(kind, root / kind) for kind in WRITE}


@pytest.fixture(params=WRITE)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]
