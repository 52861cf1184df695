"""Convert a Pillow image to RGB with few copies: 6 bytes per pixel where the decoder allows it.

Pillow stores colours in 4 bytes per pixel, and the graphs take 3. A file of such a mode is decoded
into our own memory, where the pixels are then packed in place; other images are converted band by
band. The memory of a format's decoder comes on top (`BYTES_A_PIXEL`).

Traps:
- Pillow's `convert("RGB")` clips 16-bit gray and drops transparency: both are handled here.
- A plugin may replace our memory by its own: this is checked after decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    Rgb = UInt8[np.ndarray, "H W 3"]
    Band = UInt8[np.ndarray, "h W 3"]

BAND = 1 << 18  # pixels that are converted at a time
# Modes that Pillow keeps in 4 bytes a pixel → how a band of such bytes becomes an image again.
PACKED = {"RGB": "RGBX", "RGBA": "RGBA", "CMYK": "CMYK", "LA": "LA"}
# Memory at the peak by format, the decoder's own included. Measured with Pillow 13: libwebp holds
# three copies of its canvas, libavif planes and colours; TIFF is not decoded into our memory.
BYTES_A_PIXEL = {"WEBP": 17, "AVIF": 12, "TIFF": 8}
PLAIN = 7
PROGRESSIVE = 12  # libjpeg holds the coefficients of the whole image
NOTHING = Image.new("L", (1, 1))


def bytes_needed(image: Image.Image) -> int:
    """Estimate the peak memory of decoding and converting."""
    progressive = image.info.get("progressive") or image.info.get("progression")
    each = PROGRESSIVE if progressive else BYTES_A_PIXEL.get(image.format or "", PLAIN)
    return each * image.size[0] * image.size[1]


def decode(image: Image.Image) -> Decoded:
    """Decode the image of a file that was opened for this; it can't be used afterwards.

    Raises the exceptions of Pillow's readers for damaged files.
    """
    width, height = image.size
    if not isinstance(image, ImageFile.ImageFile) or not _fits(image):
        _load(image)
        return Decoded(image, None, _orientation(image), is_ours=True)
    memory = np.zeros(width * height * 4, np.uint8)  # as Pillow's own
    lent: Any = memoryview(memory.data)
    mode = "RGBX" if image.mode == "RGB" else "RGBA" if image.mode == "LA" else image.mode
    mapped = Image.frombuffer(mode, image.size, lent, "raw", mode, 0, 1).im
    image.im = mapped
    image.load()
    orientation = _orientation(image)
    if image.im is not mapped:
        return Decoded(image, None, orientation, is_ours=True)
    image.im = NOTHING.im
    del mapped
    try:
        lent.release()
    except BufferError:  # Pillow still uses it
        memory = memory.copy()
    return Decoded(image, memory.reshape(height, width, 4), orientation, is_ours=True)


def loaded(image: Image.Image) -> Decoded:
    """Load a caller's own image, without changing it.

    Raises as `decode` does.
    """
    _load(image)
    return Decoded(image, None, _orientation(image))


def _load(image: Image.Image) -> None:
    """Load an image. Raises OSError where its pixels are indices into a palette that is missing:
    Pillow reads such a PNG, and would show it in black."""
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise OSError("the palette is missing")


def _fits(image: ImageFile.ImageFile) -> bool:
    """Whether the image can be decoded into our own memory.

    TIFF can't: its decoder checks the memory's mode, and Pillow turns the image itself. Nor can a
    file in which Pillow found no pixels, except in formats that find them when loading.
    """
    has_pixels = bool(image.tile) or image.format in ("WEBP", "AVIF")
    return image.mode in PACKED and image._im is None and image.format != "TIFF" and has_pixels


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 for broken metadata."""
    if image.format == "AVIF" and "exif" not in image.info:
        return 1  # Pillow would read XMP; in this format only the container turns images
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata: the pixels are complete
        return 1
    return found if isinstance(found, int) else 1


class Decoded:
    """A decoded image, to be converted once."""

    def __init__(
        self,
        image: Image.Image,
        memory: UInt8[np.ndarray, "H W 4"] | None,
        orientation: int,
        *,
        is_ours: bool = False,
    ):
        self.image, self.memory, self.orientation = image, memory, orientation
        self.is_ours = is_ours
        self.mode = image.mode
        self.size = image.size if memory is None else (memory.shape[1], memory.shape[0])

    def rgb(self) -> Rgb:
        """Convert to RGB, upright, with transparency on white. Raises ValueError or TypeError for a
        mode that Pillow can't convert."""
        if self.mode.startswith("I") or self.mode == "F":
            pixels = self._gray()
        else:
            image = self.image
            clear = self.mode == "RGBa" or image.has_transparency_data
            pixels = self._converted(on_white if clear else _opaque)
        return np.ascontiguousarray(_upright(pixels, self.orientation))

    def _rows(self) -> Iterator[tuple[int, int]]:
        width, height = self.size
        step = max(1, BAND // width)
        return ((top, min(top + step, height)) for top in range(0, height, step))

    def _band(self, top: int, bottom: int) -> Image.Image:
        width = self.size[0]
        if self.memory is None:
            return self.image.crop((0, top, width, bottom))
        rows = self.memory[top:bottom]
        if self.mode == "LA":  # stored as gray, gray, gray, alpha
            rows = rows[..., 2:]
        band = Image.frombytes(
            self.mode, (width, bottom - top), rows.tobytes(), "raw", PACKED[self.mode]
        )
        if "transparency" in self.image.info:
            band.info["transparency"] = self.image.info["transparency"]
        return band

    def _converted(self, convert: Callable[[Image.Image], Band]) -> Rgb:
        width, height = self.size
        shape, memory = (height, width, 3), self.memory
        if memory is None:
            pixels = np.empty(shape, np.uint8)
        else:  # the front of its own memory: pixels are written before those still to be read
            pixels = memory.reshape(-1)[: width * height * 3].reshape(shape)
        for top, bottom in self._rows():
            pixels[top:bottom] = convert(self._band(top, bottom))
        if memory is None:
            self._release()
            return pixels
        self.memory = None
        whole = memory.base
        assert isinstance(whole, np.ndarray)
        del pixels, memory
        whole.resize(width * height * 3, refcheck=False)  # frees the fourth byte
        return whole.reshape(shape)

    def _release(self) -> None:
        """Free Pillow's memory, unless the image is a caller's."""
        if self.is_ours:
            self.image.im = NOTHING.im

    def _gray(self) -> Rgb:
        """Convert 16-bit, 32-bit and float gray to 8 bits.

        16 bits are scaled (65535 becomes 255). 32-bit and float have no fixed white: values within
        0 … 255 (floats within 0 … 1 too) are taken as such, others are stretched to their own
        range. A gray that the file declares transparent is white.
        """
        lows, highs = [], []
        for top, bottom in self._rows():
            values = _finite(self._band(top, bottom))
            lows.append(float(values.min()))
            highs.append(float(values.max()))
        black, factor, divisor = gray_scale(self.mode, min(lows), max(highs))
        transparent = self.image.info.get("transparency")
        gray = np.empty((self.size[1], self.size[0]), np.uint8)
        for top, bottom in self._rows():
            band = self._band(top, bottom)
            scaled = np.rint((_finite(band) - black) * factor / divisor)
            gray[top:bottom] = np.clip(scaled, 0, 255)
            if isinstance(transparent, int):
                gray[top:bottom][np.asarray(band) == transparent] = 255
        self._release()
        return np.repeat(gray[:, :, None], 3, axis=2)


def gray_scale(mode: str, low: float, high: float) -> tuple[float, float, float]:
    """Return what to subtract from values from `low` to `high`, to multiply and to divide by."""
    if mode.startswith("I;16"):
        return 0.0, 1.0, 257.0
    if mode == "F" and low >= 0 and high <= 1:
        return 0.0, 255.0, 1.0
    if mode == "I" and low >= 0 and 255 < high <= 65535:
        return 0.0, 1.0, 257.0  # Pillow's mode for some 16-bit files
    if low < 0 or high > 255:
        return low, 255.0, (high - low) or 1.0
    return 0.0, 1.0, 1.0


def on_white(image: Image.Image) -> Band:
    """Convert a transparent image to RGB on white."""
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _opaque(image: Image.Image) -> Band:
    return np.asarray(image.convert("RGB"))


def _finite(image: Image.Image) -> Float[np.ndarray, "h W"]:
    """Return float64 values, with 0 instead of NaN and infinity."""
    values = np.asarray(image).astype(np.float64)
    return np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)


def _upright(pixels: Rgb, orientation: int) -> Rgb:
    """Return a view of the pixels, turned by EXIF's orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
