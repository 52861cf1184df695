"""A tiny model of each Qwen-VL family, its bundle and its reference, for tests of the ladder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.parity.conftest import Case
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.bundle import Bundle
from vlmport.exporter import export
from vlmport.parity.judging import max_new_tokens
from vlmport.parity.pictures import drawn_pictures
from vlmport.parity.protocol import Reference
from vlmport.parity.references import load_reference
from vlmport.parity.truth import Truth

Write = Callable[..., Path]

TURNS = "two pictures, two turns"
# With this seed neither model answers a request of the tests with one token for ever.
SEED = 5
WRITERS: dict[str, Write] = {
    "qwen2_5": partial(write_qwen2_5, seed=SEED),
    "qwen3": partial(write_qwen3, seed=SEED),
}


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint, its bundle in fp32, and the reference of both."""

    checkpoint: Path
    bundle: Bundle
    reference: Reference

    def case(self, name: str = TURNS) -> Case:
        """The request of this name."""
        pictures, manifest = drawn_pictures(), self.bundle.manifest
        request = next(one for one in self.reference.requests(pictures) if one.name == name)
        token = manifest.prompt.image_token_id
        truth = Truth.of(self.reference, request, max_new_tokens(manifest), token)
        return Case(self.checkpoint, self.bundle, self.reference, pictures[0], request, truth)


def made(folder: Path, write: Write, **settings: Any) -> Family:
    checkpoint = write(folder / "checkpoint", **settings)
    bundle = export(checkpoint, folder / "bundle", precisions="fp32")
    token = bundle.manifest.prompt.image_token_id
    return Family(checkpoint, bundle, load_reference(checkpoint, image_token_id=token))
