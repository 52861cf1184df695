"""float16 graphs that would overflow on a GPU are refused; those that would not are passed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.runtime import toy
from vlmport.errors import ExportError, WeightError
from vlmport.exporter import export, writing
from vlmport.exporter.soundness import LIMIT, check_float16, half_magnitudes

UP = "language_model.base_model.model.model.layers.0.mlp.up_proj.weight"


def scaled(folder: Path, name: str, factor: float) -> Path:
    """A tiny checkpoint with one tensor multiplied."""
    write_prefix_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = (tensors[name] * factor).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("precision", ["fp16", "q4f16"])
def test_activations_past_the_limit_are_refused_and_nothing_is_left(
    tmp_path: Path, precision: str
) -> None:
    source = scaled(tmp_path / "checkpoint", UP, 3e4)
    with pytest.raises(ExportError, match=r"decoder_model_merged: \d+ of \d+ tensors") as caught:
        export(source, tmp_path / "bundle", precisions=precision)
    assert "fp32" in str(caught.value.hint)
    assert not (tmp_path / "bundle").exists()
    export(source, tmp_path / "bundle", precisions="fp32")  # float32 holds them


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    source = scaled(tmp_path / "checkpoint", UP, 1e7)
    with raises(WeightError, "weights.past-float16", "up_proj.weight'", "float16"):
        export(source, tmp_path / "bundle", precisions="fp16")


def test_what_is_measured_are_the_float16_tensors(tmp_path: Path) -> None:
    bundle = export(write_prefix_checkpoint(tmp_path / "c"), tmp_path / "b", precisions="fp32,fp16")
    largest = check_float16(bundle, "fp16")
    assert set(largest) == {"vision_encoder", "decoder_model_merged"}
    assert all(0.1 < value < LIMIT for value in largest.values())
    pixels = {"pixel_values": np.zeros((1, 3, 30, 30), np.float32)}
    assert half_magnitudes(bundle.path("onnx/vision_encoder.onnx"), pixels) == {}
    assert len(half_magnitudes(bundle.path("onnx/vision_encoder_fp16.onnx"), pixels)) > 30


@pytest.mark.parametrize("layout", ["hub", "components"])
def test_weights_beside_a_graph_are_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Large graphs keep them in a file; nothing of the look is left in the folder."""
    monkeypatch.setattr(writing, "INLINE_BYTES", 0)
    checkpoint = write_prefix_checkpoint(tmp_path / "c")
    bundle = export(checkpoint, tmp_path / "b", precisions="q4f16", layout=layout)
    assert any(name.endswith(".onnx_data") for name in bundle.manifest.files)
    found = {p.relative_to(bundle.folder).as_posix() for p in bundle.folder.rglob("*.onnx*")}
    assert found == {name for name in bundle.manifest.files if ".onnx" in name}
    largest = check_float16(bundle, "q4f16")
    assert len(largest) == (2 if layout == "hub" else 3)
    assert all(0.1 < value < LIMIT for value in largest.values())
    source = scaled(tmp_path / "wild", UP, 3e4)
    with pytest.raises(ExportError, match=r"tensors come near .*: '[\w./]+node_\d+"):
        export(source, tmp_path / "b2", precisions="q4f16", layout=layout)


def test_positions_have_the_axes_that_the_decoder_wants(tmp_path: Path) -> None:
    """[3, batch, sequence] for models with positions in height and width."""
    for rank in (2, 3):
        folder = tmp_path / str(rank)
        bundle = toy.write_bundle(folder, positions_rank=rank, cache_dtype=TensorProto.FLOAT16)
        assert 0 < check_float16(bundle, "fp32")["decoder_model_merged"] < LIMIT
