"""Exact match of a checkpoint or a bundle: `python -m training.shapes.evaluate FOLDER`.

Captions held-out scenes greedily and compares whole captions. A checkpoint is read back from disk
(so after rounding to half precision) and run by PyTorch; a bundle is run by vlmport, at
`--precision`.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np

from training.shapes.scenes import Scene, caption, draw, pixel_values, random_scene

HELD_OUT_SEED = 20_000
SHOWN_MISTAKES = 10


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Scenes of a seed that training never uses."""
    rng = random.Random(f"{seed}-held-out")
    return [random_scene(rng) for _ in range(count)]


def captions_by_vlmport(folder: Path, scenes: list[Scene], precision: str) -> list[str]:
    """A bundle's greedy caption of each scene."""
    import vlmport

    with vlmport.load(folder, precision=precision) as model:
        return [model.caption(draw(scene)).text for scene in scenes]


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
    parser.add_argument("--precision", default="auto", help="of a bundle")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--at-least", type=float, default=97.0, help="percent")
    arguments = parser.parse_args()

    scenes = held_out(arguments.scenes, arguments.seed)
    right = [caption(scene) for scene in scenes]
    if (arguments.folder / "vlmport.json").is_file():
        given = captions_by_vlmport(arguments.folder, scenes, arguments.precision)
    else:
        given = captions_by_torch(arguments.folder, scenes)
    wrong = [(r, g) for r, g in zip(right, given, strict=True) if r != g]
    percent = 100 * (1 - len(wrong) / len(scenes))
    for r, g in wrong[:SHOWN_MISTAKES]:
        print(f"right: {r}\ngiven: {g}\n", file=sys.stderr)
    print(f"exact match {percent:.1f} % of {len(scenes)} held-out scenes")
    return 0 if percent >= arguments.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
