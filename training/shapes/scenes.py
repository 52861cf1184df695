"""The scenes of `vlmport.builtin.scenes`, and how they are fed to a model in training."""

import numpy as np
from PIL import Image

from vlmport.builtin.scenes import (
    BACKGROUNDS,
    EDGE,
    GAP,
    OUTLINES,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    clear_relation,
    draw,
    held_out,
    is_clear,
    random_scene,
    relation,
)

__all__ = [
    "BACKGROUNDS",
    "EDGE",
    "GAP",
    "OUTLINES",
    "PALETTE",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "caption",
    "clear_relation",
    "draw",
    "held_out",
    "is_clear",
    "pixel_values",
    "random_scene",
    "relation",
    "squash",
]


def squash(image: Image.Image, size: int) -> np.ndarray:
    """The picture as SigLIP's processor resizes it: [size, size, 3] uint8, aspect ignored."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def pixel_values(image: Image.Image, size: int) -> np.ndarray:
    """SigLIP's input: [3, size, size] float32 in [-1, 1]."""
    scaled = squash(image, size).astype(np.float32) * np.float32(1 / 255)
    return ((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)
