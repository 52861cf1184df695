"""Exporting takes memory for what runs at once, not for the model in several copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.thorough import cells

TEXT = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
}
EXPORT = """
import sys

def status(key):  # ru_maxrss would start with that of the parent
    return 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])

import onnxruntime, tokenizers
from vlmport.exporter import export, exporter, golden, soundness
from vlmport.runtime import probe
from vlmport.runtime.graphs import components

before = status("VmRSS")
export(sys.argv[1], sys.argv[2], precisions=sys.argv[3])
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 million parameters in the decoder, which is nearly all."""
    folder = tmp_path_factory.mktemp("memory") / "captioner"
    return write_prefix_checkpoint(folder, dtype="BF16", text=TEXT)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("precision", cells("fp16", "q4", rest=("fp32", "q8")))
def test_the_peak_is_below_two_copies_in_float32(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    """float16 is tried in float32, which once took more than three copies."""
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "out"), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    copy = 2 * (checkpoint / "model.safetensors").stat().st_size
    assert int(done.stdout.split()[-1]) < 2 * copy
