"""The built-in model is trained: on it the limits for 4 bits mean something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.verify.surgery import edit_tensor
from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle
from vlmport.export import export
from vlmport.verify import verify

SHAPES = builtin_models()["shapes"]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return export(SHAPES, tmp_path / "shapes")


def test_green_in_every_precision(bundle: Bundle) -> None:
    report = verify(bundle, SHAPES, images=[EXAMPLES / "red_square.png"])
    assert report.passed, report.summary
    assert {row.precision for row in report.rows} == set(bundle.manifest.precisions)


def test_one_four_bit_matrix_of_many_is_missed(bundle: Bundle) -> None:
    edit_tensor(
        bundle,
        "decoder_model_merged",
        "layers.1.self_attn.v_proj.weight_scales",
        np.zeros_like,
        precision="q4",
    )
    report = verify(bundle, SHAPES, precisions=["q4"])
    assert report.first_broken is not None
    assert report.first_broken.rung == "first_logits"
