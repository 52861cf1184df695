"""transformers' own reading of an FP8 checkpoint is what the export reads."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_json
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from vlmport.checkpoint import Checkpoint
from vlmport.families import family_of
from vlmport.parity.references.pretrained import load_model

SIDE = 32  # of a block
FLOAT8 = {
    "quant_method": "fp8",
    "weight_block_size": [SIDE, SIDE],
    "modules_to_not_convert": ["lm_head", "model.vision_model", "model.connector"],
}


def test_float8_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = write_idefics3_checkpoint(tmp_path / "checkpoint", text={"head_dim": 16})
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".text_model.layers." in name]:
        if tensors[name].ndim == 2:
            rows, columns = (side // SIDE for side in tensors[name].shape)
            scales = np.linspace(0.01, 0.02, rows * columns, dtype="f4").reshape(rows, columns)
            each = np.kron(scales, np.ones((SIDE, SIDE), "f4"))
            tensors[name] = (tensors[name] / each).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"quantization_config": FLOAT8})

    checkpoint = Checkpoint.open(folder)
    ours = family_of(checkpoint).weights(checkpoint, None)
    theirs = load_model(folder).state_dict()
    names = [name for name in theirs if name.startswith("model.text_model.layers.")]
    assert len(names) > 10
    for name in names:
        mine = ours[name.replace("model.text_model.", "model.", 1)].numpy()
        np.testing.assert_array_equal(mine, theirs[name].numpy(), err_msg=name)
