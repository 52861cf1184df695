"""Pictures in every format and many modes, then damaged."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.mutations import damaged

NOISE = np.random.default_rng(0).integers(0, 256, (24, 17, 4), np.uint8)
# Format → the modes that it can hold.
FORMATS = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "I", "I;16", "F", "P", "RGB", "RGBA", "CMYK", "LAB"),
    "AVIF": ("RGB", "RGBA"),
}


def in_mode(mode: str) -> Image.Image:
    """A small picture with something in each of its channels."""
    if mode in ("I", "F", "I;16"):
        types = {"I": np.int32, "F": np.float32, "I;16": np.uint16}
        return Image.fromarray(NOISE[..., 0].astype(types[mode]) * types[mode](200))
    image = Image.fromarray(NOISE, "RGBA") if mode == "RGBA" else Image.fromarray(NOISE[..., :3])
    return image.convert(mode)


def file_of(form: str, mode: str, orientation: int | None) -> bytes:
    file = io.BytesIO()
    options = {}
    if orientation is not None and form in ("PNG", "JPEG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    in_mode(mode).save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, color: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG that says what it likes, with right checksums."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"zTXt", extra), (b"IDAT", data), (b"IEND", b"")]
    parts = [_chunk(kind, body) for kind, body in chunks if body or kind != b"zTXt"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


@st.composite
def bombs(draw: st.DrawFn) -> bytes:
    """Few bytes that say they are many pixels, or unpack to many bytes."""
    side = st.sampled_from((0, 1, 7, 1000, 9_999, 10_001, 65_536, 65_537, 2**31 - 1, 2**32 - 1))
    depth, color = draw(st.sampled_from(((1, 0), (8, 2), (16, 0), (8, 3), (16, 6), (8, 4))))
    data = zlib.compress(bytes(draw(st.sampled_from((0, 99, 10_000_000)))))
    text = b"Comment\0\0" + zlib.compress(bytes(50_000_000)) if draw(st.booleans()) else b""
    return png(draw(side), draw(side), depth, color, data, text)


@st.composite
def damaged_pictures(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 5)) == 0:
        return draw(bombs())
    form = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[form]))
    data = file_of(form, mode, draw(st.none() | st.integers(0, 9)))
    return draw(damaged(data)) if draw(st.integers(0, 4)) else data
