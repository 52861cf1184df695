"""The default export holds every precision that a model can have, and says which it can't."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import write_prefix_checkpoint, write_weights
from vlmport.errors import ExportWarning, WeightError
from vlmport.exporter import export
from vlmport.runtime.model import VLM

WIDE = 40  # no multiple of 32, which a block has
ODD = {
    "hidden_size": WIDE,
    "intermediate_size": 72,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def test_a_width_that_blocks_do_not_divide(tmp_path: Path) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner", text=ODD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = export(checkpoint, tmp_path / "out")
    assert bundle.manifest.precisions == ("fp32", "q8", "q4")
    ids = np.arange(113)[None]
    exact = VLM.open(bundle, precision="fp32", threads=1).components.embed(ids)
    for precision, most in (("q8", 0.01), ("q4", 0.15)):
        rows = VLM.open(bundle, precision=precision, threads=1).components.embed(ids)
        assert rows.shape == (1, 113, WIDE)
        assert 0 < np.abs(rows - exact).max() < most


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A norm of the tower holds more than float16 can, which `components` keeps it in at q8."""
    checkpoint = write_prefix_checkpoint(tmp_path / "captioner")
    tensors = load_file(checkpoint / "model.safetensors")
    name = "vision_encoder.vision_model.encoder.layers.1.layer_norm2.bias"
    tensors[name][0] = 70000
    write_weights(checkpoint, tensors)
    return checkpoint


def test_what_a_precision_can_not_hold_is_left_out(large: Path, tmp_path: Path) -> None:
    with pytest.warns(ExportWarning, match=r"q8 is left out: .*layer_norm2\.bias.* 7e\+04") as said:
        bundle = export(large, tmp_path / "out", layout="components")
    assert [warning.message.code for warning in said] == ["export.precision-left-out"]
    assert bundle.manifest.precisions == ("fp32", "q4")
    assert not [name for name in bundle.manifest.files if "quantized" in name]
    chosen = {name for choice in bundle.manifest.auto.values() for name in choice.values()}
    assert chosen == {"any", "fp32", "q4"}
    assert "| `q8` |" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    bundle.check(hashes=True)


@pytest.mark.parametrize("precisions", ["q8", "fp32,q8,q4"])
def test_what_is_asked_for_by_name_is_an_error(
    precisions: str, large: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightError) as caught:
        export(large, tmp_path / "out", layout="components", precisions=precisions)
    assert caught.value.code == "weights.past-float16"
    assert not (tmp_path / "out").exists()
