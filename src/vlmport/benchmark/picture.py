"""The image that benchmarks caption: its size matters, its content does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import UInt8

WIDTH, HEIGHT = 640, 480


def gradient(width: int = WIDTH, height: int = HEIGHT) -> UInt8[np.ndarray, "H W 3"]:
    """Draw two gradients and a pattern."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), x * y], axis=-1)
    return rgb.astype(np.uint8)
