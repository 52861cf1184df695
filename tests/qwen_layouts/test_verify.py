"""`vlmport verify` climbs the ladders of both layouts by itself, and records what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.surgery import copied
from tests.qwen_layouts.conftest import Model
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import FUSED, GENAI
from vlmport.errors import SourceError
from vlmport.parity import verify
from vlmport.parity.ladders import LADDERS

REQUESTS = 14
CASES = {FUSED: "qwen3_vl", GENAI: "qwen2_5_vl"}


@pytest.mark.parametrize("layout", CASES)
def test_a_layout_is_green_and_recorded(
    models: dict[str, Model], tmp_path: Path, layout: str
) -> None:
    """Every request that the reference makes, strips and the smallest pictures among them."""
    model, rungs = models[CASES[layout]], LADDERS[layout].names()
    bundle = copied(getattr(model, layout), tmp_path / layout)
    assert bundle.manifest.parity is None
    report = verify(bundle, model.checkpoint, precisions=["fp32"])
    assert report.passed, report.summary
    assert len(report.rows) == REQUESTS * len(rungs)
    assert {row.rung for row in report.rows} == set(rungs)
    assert Bundle.open(bundle.folder).manifest.parity == report.to_json()


def test_another_model_is_refused(models: dict[str, Model]) -> None:
    with pytest.raises(SourceError):
        verify(models["qwen3_vl"].fused, models["qwen2_5_vl"].checkpoint, precisions=["fp32"])
