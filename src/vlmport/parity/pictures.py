"""The images of the ladder: drawn ones of awkward sizes, and the user's own.

None of the drawn ones has the size of a model's input, so that nothing passes that is right at one
size only: a wide image that is shrunk, a tall one, and a strip that is enlarged by any model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vlmport.runtime.images.reading import open_image

if TYPE_CHECKING:
    from jaxtyping import UInt8

    from vlmport.runtime.images.reading import ImageSource

SIZES = ((640, 427), (120, 300), (51, 17))  # width, height
NOISE = 12  # levels either way


@dataclass(frozen=True)
class Picture:
    """An RGB image with a name."""

    name: str
    image: Image.Image

    @property
    def rgb(self) -> UInt8[np.ndarray, "H W 3"]:
        return np.asarray(self.image)


def drawn_pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Picture]:
    """Draw one image of each size, the same on every machine."""
    return [Picture(f"drawn {w}x{h}", _draw(w, h, seed)) for seed, (w, h) in enumerate(sizes)]


def _draw(width: int, height: int, seed: int) -> Image.Image:
    """Draw a gradient in three directions, three shapes with hard edges, and noise over all."""
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    ramp = np.stack([x + 0 * y, 0 * x + y, (x + y) / 2], axis=-1)
    image = Image.fromarray(np.round(60 + 160 * ramp).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0.06 * width, 0.1 * height, 0.42 * width, 0.55 * height), fill=(230, 30, 35))
    draw.rectangle((0.55 * width, 0.2 * height, 0.9 * width, 0.6 * height), fill=(40, 85, 220))
    corners = [(0.3, 0.95), (0.5, 0.6), (0.7, 0.95)]
    draw.polygon([(u * width, v * height) for u, v in corners], fill=(250, 225, 45))
    noise = np.random.default_rng(seed).integers(-NOISE, NOISE + 1, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def named_pictures(images: Sequence[ImageSource]) -> list[Picture]:
    """Open the user's images as the runtime opens them. Raises ImageError.

    Each gets a name of its own, by which reports list it.
    """
    pictures: dict[str, Picture] = {}
    for number, image in enumerate(images):
        path = image if isinstance(image, str | Path) else getattr(image, "filename", None)
        plain = Path(path).name if path else f"picture {number + 1}"
        others = (f"{plain} ({again})" for again in itertools.count(2))
        name = next(name for name in itertools.chain([plain], others) if name not in pictures)
        pictures[name] = Picture(name, Image.fromarray(open_image(image)))
    return list(pictures.values())
