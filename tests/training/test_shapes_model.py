"""The shipped checkpoint, read back from disk, captions the example pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.shapes.checkpoint import read_checkpoint
from training.shapes.scenes import pixel_values

ROOT = Path(__file__).parents[2]


# transformers 5.23 warns of a method that peft 0.21 still calls.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_examples_are_captioned_right() -> None:
    captions = json.loads((ROOT / "examples" / "captions.json").read_text())
    model, config, tokenizer = read_checkpoint(ROOT / "src/vlmport/builtin/shapes")
    size = config["vision_config"]["image_size"]
    pixels = [pixel_values(Image.open(ROOT / "examples" / name), size) for name in captions]
    ids = model.greedy(torch.from_numpy(np.stack(pixels)), config["max_length"])
    assert tokenizer.decode_batch(ids.tolist()) == list(captions.values())
