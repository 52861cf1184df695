"""Tiny bundles and what the reference makes of them, once for all tests of the ladder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.parity.surgery import copied
from vlmport.bundle import Bundle
from vlmport.exporter import export
from vlmport.parity.asked import Request
from vlmport.parity.judging import max_new_tokens
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.pictures import Picture, drawn_pictures
from vlmport.parity.protocol import Reference
from vlmport.parity.references import load_reference
from vlmport.parity.report import Report
from vlmport.parity.truth import Truth
from vlmport.runtime.model import VLM

if TYPE_CHECKING:
    from tests.parity.qwen import Family


@dataclass(frozen=True)
class Case:
    """A checkpoint, its bundle, and the truth for a caption of one picture."""

    checkpoint: Path
    bundle: Bundle
    reference: Reference
    picture: Picture
    request: Request
    truth: Truth

    def climb(self, bundle: Bundle, precision: str = "fp32") -> Report:
        """The ladder on a bundle of this checkpoint, whole or broken."""
        model = VLM.open(bundle, precision=precision)
        ladder = HubLadder(model, self.reference, self.request, self.truth, (0, 1))
        return Report(self.reference.versions, tuple(ladder.climb(precision)))


def case(checkpoint: Path, bundle: Bundle, picture: Picture) -> Case:
    token = bundle.manifest.prompt.image_token_id
    reference = load_reference(checkpoint, image_token_id=token)
    request = reference.requests([picture])[0]
    truth = Truth.of(reference, request, max_new_tokens(bundle.manifest), token)
    return Case(checkpoint, bundle, reference, picture, request, truth)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An untied head: with a tied one, a random model says one token for ever."""
    folder = tmp_path_factory.mktemp("verify")
    checkpoint = write_prefix_checkpoint(
        folder / "checkpoint", text={"tie_word_embeddings": False}, config={"max_length": 12}
    )
    bundle = export(checkpoint, folder / "bundle", precisions=("fp32", "q4"))
    return case(checkpoint, bundle, drawn_pictures()[1])


@pytest.fixture(scope="session")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """One of each Qwen-VL family."""
    from tests.parity.qwen import WRITERS, made

    return {name: made(tmp_path_factory.mktemp(name), write) for name, write in WRITERS.items()}


@pytest.fixture(scope="session")
def qwen_cases(qwens: dict[str, Family]) -> dict[str, Case]:
    """Two pictures of different grids over two turns."""
    return {name: family.case() for name, family in qwens.items()}


@pytest.fixture
def broken(tiny: Case, tmp_path: Path) -> Bundle:
    """A copy of the tiny bundle, to be broken."""
    return copied(tiny.bundle, tmp_path / "broken")


def assert_first_broken(report: Report, rung: str) -> None:
    """It is this rung, and every rung below it passed."""
    assert report.first_broken is not None, "nothing broke"
    assert report.first_broken.rung == rung, report.summary
    assert [row.rung for row in report.rows] == list(HubLadder.names())


def value(report: Report, rung: str, name: str) -> float:
    """A measure of the one row of this rung."""
    (row,) = (row for row in report.rows if row.rung == rung)
    return next(measure.value for measure in row.measures if measure.name == name)


def failing(report: Report, rung: str) -> set[str]:
    """The measures of a rung that are past their limits."""
    (row,) = (row for row in report.rows if row.rung == rung)
    return {measure.name for measure in row.measures if not measure.passed}
