"""Files of every format and feature that a browser must read as Python does, or refuse."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from tests.web.pictures import colours, swap_red_and_green

LOSSLESS = {"lossless": True, "exact": True}
# Adam7: the first column and row of each pass, and the steps between.
PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
SRGB = "sRGB"


def matrix() -> dict[str, bytes]:
    """Name → file. What a name begins with is its format."""
    parts = (orientations(), alphas(), depths(), profiles(), animations(), sides(), variants())
    return dict(itertools.chain(*parts))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


RGB, RGBA = colours(37, 23), colours(31, 19, alpha=True)


def orientations() -> Iterator[tuple[str, bytes]]:
    lossy = {"quality": 90, "subsampling": 0}
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = exif.tobytes()
        yield f"jpeg turned {orientation}", saved(RGB, "JPEG", exif=turned, **lossy)
        yield f"png turned {orientation}", saved(RGB, "PNG", exif=turned)
        yield f"webp turned {orientation}", saved(RGB, "WEBP", exif=turned, **LOSSLESS)
        yield (
            f"avif turned {orientation}",
            saved(RGB, "AVIF", exif=turned, quality=100, subsampling="4:4:4"),
        )
    little = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x04\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    yield "jpeg little-endian long", saved(RGB, "JPEG", exif=little, **lossy)
    yield "webp little-endian long", saved(RGB, "WEBP", exif=little, **LOSSLESS)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    yield "jpeg xmp", saved(RGB, "JPEG", xmp=xmp, **lossy)
    yield "webp xmp", saved(RGB, "WEBP", xmp=xmp, **LOSSLESS)
    yield "avif xmp", saved(RGB, "AVIF", xmp=xmp, quality=100, subsampling="4:4:4")
    profile = f"\nexif\n{len(turned):8}\n{turned.hex()}\n"
    for name, key, value in (
        ("xmp", "XML:com.adobe.xmp", xmp.decode()),
        ("raw profile", "Raw profile type exif", profile),
    ):
        for packed in (False, True):
            texts = PngImagePlugin.PngInfo()
            if name == "xmp":
                texts.add_itxt(key, value, zip=packed)
            else:
                texts.add_text(key, value, zip=packed)
            yield f"png {name}{' packed' * packed}", saved(RGB, "PNG", pnginfo=texts)
    yield "jpeg exif that is none", saved(RGB, "JPEG", exif=b"Exif\0\0nothing of the kind", **lossy)


def alphas() -> Iterator[tuple[str, bytes]]:
    yield "png alpha", saved(RGBA, "PNG")
    yield "png gray alpha", saved(RGBA.convert("LA"), "PNG")
    yield "png palette clear", saved(RGB.quantize(32), "PNG", transparency=3)
    yield "png palette alpha", saved(RGB.quantize(32), "PNG", transparency=bytes(range(0, 256, 8)))
    yield (
        "png clear colour",
        saved(Image.new("RGB", (5, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    )
    gray = RGB.convert("L")
    yield "png clear gray", saved(gray, "PNG", transparency=gray.getpixel((3, 3)))
    yield "png clear bit", saved(RGB.convert("1"), "PNG", transparency=0)
    yield "webp alpha", saved(RGBA, "WEBP", **LOSSLESS)
    yield "webp alpha lossy", saved(RGBA, "WEBP", quality=95)
    yield "avif alpha", saved(RGBA, "AVIF", quality=100, subsampling="4:4:4")
    yield "gif clear", saved(RGB.quantize(32), "GIF", transparency=3)
    yield "bmp alpha", saved(RGBA, "BMP")


def png16(color: int, channels: int, *, interlaced: bool = False, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, a row of each filter."""
    width, height, pixel = 19, 14, 2 * channels
    values = (
        np.random.default_rng(color).integers(0, 65536, (height, width, channels)).astype(">u2")
    )
    if clear:
        values[2:4, 3:9] = 1234
    data = b""
    for x, y, dx, dy in PASSES if interlaced else ((0, 0, 1, 1),):
        part = values[y::dy, x::dx]
        above = np.zeros(part.shape[1] * pixel, int)
        for n, row in enumerate(part if part.shape[1] else []):
            line = np.frombuffer(row.tobytes(), np.uint8).astype(int)
            left = np.concatenate([np.zeros(pixel, int), line[:-pixel]])
            corner = np.concatenate([np.zeros(pixel, int), above[:-pixel]])
            guess = left + above - corner
            a, b, c = abs(guess - left), abs(guess - above), abs(guess - corner)
            paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, above, corner))
            predicted = (0 * line, left, above, (left + above) // 2, paeth)[n % 5]
            data += bytes([n % 5]) + (line - predicted).astype(np.uint8).tobytes()
            above = line
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, int(interlaced))
    return png(
        [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    )


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
        if data or kind == b"IEND"
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def depths() -> Iterator[tuple[str, bytes]]:
    for name, color, channels in (
        ("gray", 0, 1),
        ("rgb", 2, 3),
        ("gray alpha", 4, 2),
        ("rgba", 6, 4),
    ):
        yield f"png 16 {name}", png16(color, channels)
        yield f"png 16 {name} interlaced", png16(color, channels, interlaced=True)
    yield "png 16 gray clear", png16(0, 1, clear=struct.pack(">H", 1234))
    for bits in (1, 2, 4, 8):
        yield f"png palette {bits} bits", saved(RGB.quantize(2**bits), "PNG", bits=bits)
    yield "png bits", saved(RGB.convert("1"), "PNG")
    yield "png gray", saved(RGB.convert("L"), "PNG")
    yield "bmp palette", saved(RGB.quantize(200), "BMP")
    yield "bmp bits", saved(RGB.convert("1"), "BMP")
    yield "bmp gray", saved(RGB.convert("L"), "BMP")
    yield "bmp rgb", saved(RGB, "BMP")
    yield "gif gray", saved(RGB.convert("L"), "GIF")
    yield "bmp 16 bits", bmp16(9, 7)


def bmp16(width: int, height: int) -> bytes:
    """A BMP of 5 bits a colour."""
    stride = (2 * width + 3) // 4 * 4
    pixels = np.random.default_rng(0).integers(0, 1 << 15, (height, stride // 2), np.uint16)
    size = 54 + stride * height
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, stride * height, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, 54) + header + pixels.tobytes()


def profiles() -> Iterator[tuple[str, bytes]]:
    profile = swap_red_and_green(ImageCms.createProfile(SRGB))
    yield "png profile", saved(RGB, "PNG", icc_profile=profile)
    yield "jpeg profile", saved(RGB, "JPEG", quality=90, subsampling=0, icc_profile=profile)
    yield "webp profile", saved(RGB, "WEBP", icc_profile=profile, **LOSSLESS)
    yield "webp profile alpha", saved(RGBA, "WEBP", icc_profile=profile, **LOSSLESS)
    yield "avif profile", saved(RGB, "AVIF", quality=100, subsampling="4:4:4", icc_profile=profile)
    plain = saved(RGB, "PNG")
    header, rest = plain[8:33], plain[33:]
    linear = png([(b"gAMA", struct.pack(">I", 100_000))])[8:]
    wide = png(
        [(b"cHRM", struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600))]
    )[8:]
    coded = png([(b"cICP", bytes([9, 16, 0, 1]))])[8:]
    for name, chunk in (
        ("gamma", linear),
        ("gamma and chroma", linear + wide),
        ("coded colours", coded),
    ):
        yield f"png {name}", plain[:8] + header + chunk + rest


def animations() -> Iterator[tuple[str, bytes]]:
    frames = [colours(30, 20), colours(30, 20).rotate(180), Image.new("RGB", (30, 20), "red")]
    many: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 50}
    yield "gif animation", saved(frames[0].quantize(32), "GIF", **(many | {"disposal": 2}))
    yield "png animation", saved(frames[0], "PNG", **many)
    yield "png animation, other default", saved(frames[0], "PNG", default_image=True, **many)
    yield "webp animation", saved(frames[0], "WEBP", **many, **LOSSLESS)
    partial = bytearray(saved(frames[0], "WEBP", **many, **LOSSLESS))
    at = partial.index(b"VP8X") + 12
    partial[at : at + 6] = (39).to_bytes(3, "little") + (24).to_bytes(3, "little")
    yield "webp partial first frame", bytes(partial)
    for name, options in (("", {}), (" clear", {"transparency": 3})):
        partial = bytearray(saved(frames[0].quantize(32), "GIF", **options))
        partial[6:10] = struct.pack("<2H", 40, 26)
        at = partial.index(b"\x2c\0\0\0\0\x1e\0\x14\0")
        partial[at + 1 : at + 5] = struct.pack("<2H", 4, 5)
        yield f"gif partial first frame{name}", bytes(partial)
    larger = bytearray(saved(frames[0].quantize(32), "GIF"))
    larger[6:10] = struct.pack("<2H", 12, 7)
    yield "gif larger first frame", bytes(larger)


def sides() -> Iterator[tuple[str, bytes]]:
    for width, height in (
        (1, 1),
        (1, 3000),
        (3000, 1),
        (20_000, 3),
        (3, 20_000),
        (65_536, 1),
        (1, 65_536),
    ):
        yield f"png {width}x{height}", saved(colours(width, height), "PNG")
    yield "png 20000x2 alpha", saved(colours(20_000, 2, alpha=True), "PNG")
    yield "jpeg 65500x1", saved(colours(65_500, 1), "JPEG", quality=90, subsampling=0)
    yield "jpeg 1x65500", saved(colours(1, 65_500), "JPEG", quality=90, subsampling=0)
    yield "webp 16383x1", saved(colours(16_383, 1), "WEBP", **LOSSLESS)
    yield "gif 1x40000", saved(colours(1, 40_000).quantize(32), "GIF")
    yield "bmp 40000x1", saved(colours(40_000, 1), "BMP")


def variants() -> Iterator[tuple[str, bytes]]:
    """What decoders may differ in."""
    large = colours(64, 48)
    for name, subsampling in (("444", 0), ("422", 1), ("420", 2)):
        for progressive in (False, True):
            kind = f"{name}{' progressive' * progressive}"
            options = {"quality": 90, "subsampling": subsampling, "progressive": progressive}
            yield f"jpeg {kind}", saved(large, "JPEG", **options)
    plain = saved(large, "JPEG", quality=90)
    yield "jpeg with junk between segments", plain[:20] + b"\0junk\0" + plain[20:]
    yield "jpeg gray", saved(large.convert("L"), "JPEG", quality=90)
    yield "jpeg cmyk", saved(large.convert("CMYK"), "JPEG", quality=90)
    yield "webp lossy", saved(large, "WEBP", quality=80)
    yield "webp odd lossy", saved(RGB, "WEBP", quality=80)
    yield "avif 420", saved(large, "AVIF", quality=80)
    yield "avif 444", saved(large, "AVIF", quality=80, subsampling="4:4:4")
    yield "avif gray", saved(large.convert("L"), "AVIF", quality=80)


def damaged() -> dict[str, bytes]:
    """Halves of files, and headers that promise too much: what Python and the web refuse."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    found = {}
    for form in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP"):
        whole = saved(noise, form)
        for share in (0.3, 0.5, 0.9):
            found[f"{form.lower()} {share}"] = whole[: int(len(whole) * share)]
    bomb = struct.pack(">IIBBBBB", 10_001, 10_000, 8, 2, 0, 0, 0)
    found["png bomb"] = png([(b"IHDR", bomb), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")])
    gif = bytearray(saved(noise, "GIF"))
    gif[6:10] = struct.pack("<2H", 10_001, 10_000)
    found["gif bomb"] = bytes(gif)
    bmp = bytearray(saved(noise, "BMP"))
    bmp[18:26] = struct.pack("<2i", 70_000, 1)
    found["bmp bomb"] = bytes(bmp)
    jpeg = bytearray(saved(noise, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">2H", 10_000, 10_001)
    found["jpeg bomb"] = bytes(jpeg)
    webp = bytearray(saved(RGBA, "WEBP", save_all=True, append_images=[RGBA.rotate(90)]))
    at = webp.index(b"VP8X") + 12
    webp[at : at + 6] = (10_000).to_bytes(3, "little") + (9_999).to_bytes(3, "little")
    found["webp bomb"] = bytes(webp)
    avif = bytearray(saved(noise, "AVIF"))
    at = avif.index(b"ispe") + 8
    avif[at : at + 8] = struct.pack(">2I", 10_001, 10_000)
    found["avif bomb"] = bytes(avif)
    return found
