"""Small pictures of all kinds that a browser must read as Python does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


def write_pictures(folder: Path) -> list[Path]:
    """One file of each kind, of odd sizes, with smooth colours."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb, rgba = colours(37, 23), colours(31, 19, alpha=True)
    swapped = swap_red_and_green(ImageCms.createProfile("sRGB"))
    turned = Image.Exif()
    saved = {
        "rgb.png": (rgb, {}),
        "tall.png": (colours(11, 47), {}),
        "profile.png": (rgb, {"icc_profile": swapped}),
        "gray.png": (rgb.convert("L"), {}),
        "palette.png": (rgb.quantize(32), {}),
        "transparent_palette.png": (rgb.quantize(32), {"transparency": 3}),
        "half_transparent.png": (rgba, {}),
        "gray_alpha.png": (rgba.convert("LA"), {}),
        "bits.png": (rgb.convert("1"), {}),
        "lossless.webp": (rgb, {"lossless": True}),
        "half_transparent.webp": (rgba, {"lossless": True, "exact": True}),
        "rgb.bmp": (rgb, {}),
        "palette.gif": (rgb.quantize(32), {}),
        "rgb.jpg": (rgb, {"quality": 90, "subsampling": 0}),
        "subsampled.jpg": (colours(64, 48), {"quality": 90, "subsampling": 2}),
        "progressive.jpg": (rgb, {"quality": 90, "subsampling": 0, "progressive": True}),
        "gray.jpg": (rgb.convert("L"), {"quality": 90}),
    }
    for orientation in range(2, 9):
        turned[0x0112] = orientation
        exif = turned.tobytes()
        saved[f"turned_{orientation}.jpg"] = (rgb, {"quality": 90, "subsampling": 0, "exif": exif})
    saved["turned.png"] = (rgb, {"exif": exif})
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    return [folder / name for name in saved]


def colours(width: int, height: int, *, alpha: bool = False) -> Image.Image:
    """Sines of different lengths; alpha goes from 0 to 255 by way of every value."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 + 127.5 * np.sin((x * a + y * b) / 9) for a, b in ((1, 2), (3, -1), (-2, 2))]
    if alpha:
        waves.append((x + y * width) * 255 / (width * height - 1))
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8), "RGBA" if alpha else "RGB")


def swap_red_and_green(srgb: ImageCms.core.CmsProfile) -> bytes:
    """An ICC profile under which every colour is another: what it says has to be ignored."""
    data = bytearray(ImageCms.ImageCmsProfile(srgb).tobytes())
    red, green = data.index(b"rXYZ", 128), data.index(b"gXYZ", 128)
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)
