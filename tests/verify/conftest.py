"""Tiny bundles and what the reference makes of them, once for all tests of the ladder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.verify.surgery import copied
from vlmport.bundle import Bundle
from vlmport.export import export
from vlmport.runtime.model import VLM
from vlmport.verify.ladder import Ladder, Truth, max_new_tokens
from vlmport.verify.pictures import Picture, drawn_pictures
from vlmport.verify.protocol import Reference
from vlmport.verify.reference import load_reference
from vlmport.verify.report import Report


@dataclass(frozen=True)
class Tiny:
    """A random checkpoint, its bundle, and the truth for one picture."""

    checkpoint: Path
    bundle: Bundle
    reference: Reference
    picture: Picture
    truth: Truth

    def climb(self, bundle: Bundle, precision: str = "fp32") -> Report:
        """The ladder on a bundle of this checkpoint, whole or broken."""
        model = VLM.open(bundle, precision=precision)
        ladder = Ladder(model, self.reference, self.picture, self.truth, (0, 1))
        return Report(self.reference.versions, tuple(ladder.climb(precision)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """An untied head: with a tied one, a random model says one token for ever."""
    folder = tmp_path_factory.mktemp("verify")
    checkpoint = write_prefix_checkpoint(
        folder / "checkpoint", text={"tie_word_embeddings": False}, config={"max_length": 12}
    )
    bundle = export(checkpoint, folder / "bundle", precisions=("fp32", "q4"))
    prompt = bundle.manifest.prompt
    reference = load_reference(checkpoint, image_token_id=prompt.image_token_id)
    picture = drawn_pictures()[1]
    limit = max_new_tokens(bundle.manifest)
    truth = Truth.of(reference, picture, limit, prompt.image_token_id)
    return Tiny(checkpoint, bundle, reference, picture, truth)


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Bundle:
    """A copy of the tiny bundle, to be broken."""
    return copied(tiny.bundle, tmp_path / "broken")
