"""Exact match of a checkpoint: `python -m training.shapes.evaluate FOLDER`.

Captions held-out scenes greedily and compares whole captions. The checkpoint is read back from
disk (so after rounding to half precision) and run by PyTorch. `vlmport eval` measures its bundle
on the same scenes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from training.shapes.scenes import Scene, caption, draw, held_out, pixel_values
from vlmport.builtin.scenes import HELD_OUT_SEED

SHOWN_MISTAKES = 10


def captions_by_torch(folder: Path, scenes: list[Scene], batch_size: int = 100) -> list[str]:
    """A checkpoint's greedy caption of each scene."""
    import torch

    from training.shapes.checkpoint import read_checkpoint

    model, config, tokenizer = read_checkpoint(folder)
    size = config["vision_config"]["image_size"]
    captions: list[str] = []
    for start in range(0, len(scenes), batch_size):
        pixels = [pixel_values(draw(s), size) for s in scenes[start : start + batch_size]]
        ids = model.greedy(torch.from_numpy(np.stack(pixels)), config["max_length"])
        captions += tokenizer.decode_batch(ids.tolist())
    return captions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--at-least", type=float, default=97.0, help="percent")
    arguments = parser.parse_args()

    scenes = held_out(arguments.scenes, arguments.seed)
    right = [caption(scene) for scene in scenes]
    given = captions_by_torch(arguments.folder, scenes)
    wrong = [(r, g) for r, g in zip(right, given, strict=True) if r != g]
    percent = 100 * (1 - len(wrong) / len(scenes))
    for r, g in wrong[:SHOWN_MISTAKES]:
        print(f"right: {r}\ngiven: {g}\n", file=sys.stderr)
    print(f"exact match {percent:.1f} % of {len(scenes)} held-out scenes")
    return 0 if percent >= arguments.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
