"""float16 in towers with branches and few large channels: what is recorded, and what is refused.

Trained towers of this kind have channels that are hundreds of times larger than the rest; random
weights have none unless they are put there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.bundle import Bundle
from vlmport.errors import ExportError
from vlmport.exporter import export
from vlmport.exporter.soundness import LIMIT, check_float16, half_magnitudes
from vlmport.families.qwen_vl.tower_2_5 import MASKED
from vlmport.runtime.graphs.components import Components

Write = Callable[..., Path]

WRITERS: dict[str, Write] = {"qwen2_5": write_qwen2_5, "qwen3": write_qwen3}
CHANNELS = (3, 17)  # of those that a layer adds to the residual sum
ADDED = ("attn.proj.weight", "mlp.down_proj.weight", "mlp.linear_fc2.weight", "o_proj.weight")


def with_outliers(folder: Path, write: Write, factor: float, part: str = "") -> Path:
    """A tiny checkpoint in which two channels are as much larger."""
    write(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if part in name and name.endswith(ADDED):
            tensor[list(CHANNELS)] *= factor
    save_file(tensors, path)
    return folder


def largest_activation(bundle: Bundle, rgb: np.ndarray) -> float:
    """The largest value in the fp16 tower but for the bias of masked places, larger than any."""
    path = bundle.path(bundle.variant("vision_encoder", "fp16").model)
    inputs = Components.open(bundle, precision="fp16").process_image(rgb).inputs
    return max(value for value in half_magnitudes(path, inputs).values() if value != -MASKED)


@pytest.mark.parametrize("name", WRITERS)
def test_large_channels_that_float16_holds_are_recorded(tmp_path: Path, name: str) -> None:
    write = WRITERS[name]
    rgb = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    of_tower = {}
    for factor in (1.0, 100.0):
        source = with_outliers(tmp_path / f"checkpoint{factor:g}", write, factor)
        bundle = export(source, tmp_path / f"bundle{factor:g}", precisions="fp32,fp16")
        assert all(0.1 < value < LIMIT for value in check_float16(bundle, "fp16").values())
        of_tower[factor] = largest_activation(bundle, rgb)
    assert of_tower[100.0] > 10 * of_tower[1.0]

    features = {}
    for precision in ("fp32", "fp16"):
        components = Components.open(bundle, precision=precision)
        features[precision] = components.encode_image(components.process_image(rgb).inputs)
    error = np.linalg.norm(features["fp16"] - features["fp32"])
    assert 0 < error < 0.01 * np.linalg.norm(features["fp32"])


@pytest.mark.parametrize(
    ("part", "component"), [("visual.", "vision_encoder"), ("layers.", "decoder_model_merged")]
)
@pytest.mark.parametrize("name", WRITERS)
def test_channels_past_the_limit_are_refused(
    tmp_path: Path, name: str, part: str, component: str
) -> None:
    source = with_outliers(tmp_path / "checkpoint", WRITERS[name], 3e4, part)
    with pytest.raises(ExportError, match=rf"{component}: \d+ of \d+ tensors come near"):
        export(source, tmp_path / "bundle", precisions="fp16")
    assert not (tmp_path / "bundle").exists()


def test_what_a_branch_yields_is_looked_at(tmp_path: Path) -> None:
    """Attention within frames is one of two branches, which name the float16 of the graph around
    them and nothing else."""
    source = write_qwen3(tmp_path / "checkpoint")
    bundle = export(source, tmp_path / "bundle", precisions="fp16")
    path = bundle.path(bundle.variant("vision_encoder", "fp16").model)
    names = [node.name for node in ir.load(path).graph if node.op_type == "If"]
    assert len(names) == 4  # a block's each
    components = Components.open(bundle, precision="fp16")
    inputs = components.process_image(np.zeros((60, 90, 3), np.uint8)).inputs
    magnitudes = half_magnitudes(path, inputs)
    assert set(names) <= magnitudes.keys()
    assert all(0 < magnitudes[name] < LIMIT for name in names)
