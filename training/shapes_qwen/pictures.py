"""Qwen-VL's side of a picture, in small: its size on the model's grid, and its patches.

A token is 2 x 2 patches of 12 x 12 pixels, so sides are multiples of 24. A picture of any size
becomes one of as many tokens as `Canvases` says, its aspect ratio kept as well as that allows.
Sources: transformers 5.23, image_processing_pil_qwen2_vl.py.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from training.shapes_qwen.families import Family

PATCH, MERGE, FRAMES = 12, 2, 2
FACTOR = PATCH * MERGE
SHORTER_SIDE = (80, 320)


class Canvases(NamedTuple):
    """Which pictures there are, and how many tokens the processor makes of each."""

    least_tokens: int
    most_tokens: int
    longest_ratio: float

    @property
    def pixels(self) -> tuple[int, int]:
        """The processor's min_pixels and max_pixels."""
        return self.least_tokens * FACTOR**2, self.most_tokens * FACTOR**2


# 25 grids, 8 to 12 patches on the shorter side; in one picture of a hundred 6.
WIDE = Canvases(16, 42, 2.0)
# 9 grids, 10 or 12 patches on the shorter side. What ships knows these.
SHIPPED = Canvases(30, 42, 1.6)


class Grid(NamedTuple):
    """Patches of a picture: even numbers."""

    rows: int
    columns: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture in pixels."""
        return self.columns * PATCH, self.rows * PATCH

    @property
    def merged(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.rows // MERGE, self.columns // MERGE

    @property
    def tokens(self) -> int:
        """Of the picture in the prompt."""
        return self.rows * self.columns // MERGE**2


def grid_of(width: int, height: int, canvases: Canvases = SHIPPED) -> Grid:
    """The grid that the processor chooses; halves are rounded to even."""
    least, most = canvases.pixels
    high, wide = (round(side / FACTOR) * FACTOR for side in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (
            max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width)
        )
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return Grid(high // PATCH, wide // PATCH)


def random_canvas(
    rng: random.Random, grid: Grid | None = None, canvases: Canvases = SHIPPED
) -> tuple[int, int]:
    """Width and height of a canvas in pixels; of those that have the given grid."""
    least, most = map(math.log, SHORTER_SIDE)
    while True:
        short = math.exp(rng.uniform(least, most))
        long = round(short * canvases.longest_ratio ** rng.random())
        sides = (round(short), long) if rng.random() < 0.5 else (long, round(short))
        if grid is None or grid_of(*sides, canvases) == grid:
            return sides


def resized(image: Image.Image, canvases: Canvases = SHIPPED) -> np.ndarray:
    """[H, W, 3] uint8: the picture as the processor resizes it."""
    size = grid_of(*image.size, canvases).size
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def patches(pictures: torch.Tensor, family: Family) -> torch.Tensor:
    """[B, H, W, 3] uint8 → [B, N, 864] float32, scaled as the family does, in merge order.

    A still picture fills both frames of a patch.
    """
    mean, std = torch.tensor(family.mean), torch.tensor(family.std)
    pixels = (pictures.float() / 255 - mean) / std
    B, H, W, _ = pixels.shape
    blocks = pixels.view(B, H // FACTOR, MERGE, PATCH, W // FACTOR, MERGE, PATCH, 3)
    blocks = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6)  # [B, h, w, 2, 2, 3, 12, 12]
    both = blocks.unsqueeze(6).expand(*blocks.shape[:6], FRAMES, PATCH, PATCH)
    return both.reshape(B, -1, 3 * FRAMES * PATCH * PATCH)


def in_merge_order(values: np.ndarray, grid: Grid) -> np.ndarray:
    """[N, ...] row by row → [N, ...] block by block, as the tower sees its patches."""
    rows, columns = grid.merged
    rest = values.shape[1:]
    blocks = values.reshape(rows, MERGE, columns, MERGE, *rest).swapaxes(1, 2)
    return blocks.reshape(-1, *rest)
