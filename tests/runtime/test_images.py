"""Pictures of every kind, whole or refused in one line."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFile, ImageOps

from tests.shared_testdata import shared_testdata
from vlmport.errors import ImageError
from vlmport.runtime.images.reading import MAX_PIXELS, MAX_SIDE, open_image

REAL = shared_testdata("images")
RGB = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
SMOOTH = np.repeat(np.repeat(RGB[::8, ::8], 8, 0), 8, 1)  # JPEG keeps it nearly as it is


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def real(name: str) -> Path:
    if REAL is None:
        pytest.skip("no shared test data")
    return REAL / name


def refused(source: object) -> str:
    """The error's message, which is one line, with a hint beside it."""
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


def code_of(source: object) -> str | None:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    return caught.value.code


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_forms_give_their_pixels(form: str):
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(open_image(encoded(Image.fromarray(RGB), form, **options)), RGB)


def test_every_kind_of_source_gives_the_same(tmp_path: Path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    with path.open("rb") as file, Image.open(path) as image:
        for source in (str(path), path, path.read_bytes(), file, image, RGB):
            np.testing.assert_array_equal(open_image(source), RGB)
        assert not file.closed


def test_a_pipe_is_read_whole(tmp_path: Path):
    """As in `vlmport caption <(cat a.png)` and `/dev/stdin`: it can't be sought in."""
    data = encoded(Image.fromarray(RGB), "PNG")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(data,))
    writer.start()
    np.testing.assert_array_equal(open_image(fifo), RGB)
    writer.join()
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    with open(read, "rb", buffering=0) as file:
        np.testing.assert_array_equal(open_image(file), RGB)
        assert not file.closed


class Stream:
    """A file-like object with `read` alone, which fails after its data if told so."""

    def __init__(self, data: bytes | str, error: OSError | None = None):
        self.data, self.error = data, error

    def read(self, size: int) -> bytes | str:
        if self.error and not self.data:
            raise self.error
        given, self.data = self.data[:size], self.data[size:]
        return given


def test_streams_that_fail_or_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = encoded(Image.fromarray(RGB), "PNG")
    np.testing.assert_array_equal(open_image(Stream(data)), RGB)  # type: ignore[arg-type]
    failing = Stream(data[:50], OSError(5, "Input/output error"))
    assert "the file: can't be read: Input/output error" in refused(failing)
    assert "can't be read" in refused(Stream("text"))
    assert "can't be read: it gives str" in refused(io.StringIO("text"))
    with (tmp_path / "closed.png").open("wb+") as file:
        file.write(data)
        np.testing.assert_array_equal(open_image(file), RGB)  # from the start, as Pillow reads
    assert "closed.png: can't be read: seek of closed file" in refused(file)
    monkeypatch.setattr("vlmport.runtime.images.reading.MAX_STREAM", 99)
    assert code_of(Stream(data)) == "image.too-large"
    assert code_of(data[:99]) == "image.damaged"  # the limit is for streams only


def test_a_name_that_no_file_can_have():
    assert "File name too long" in refused("a" * 300)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int):
    image = Image.fromarray(SMOOTH)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(open_image(data), np.array(upright))
    assert open_image(data).shape[:2] == ((24, 32) if orientation < 5 else (32, 24))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_laid_on_white(mode: str):
    gray = mode == "LA"
    color = Image.new("L" if gray else "RGB", (4, 1), 0 if gray else (204, 0, 0))
    alpha = Image.fromarray(np.array([[0, 85, 170, 255]], np.uint8))
    image = color.convert("P") if mode == "PA" else color
    image = image.convert(mode)
    image.putalpha(alpha)
    assert image.mode == mode
    front = 0 if gray else 204  # a colour of Pillow's standard palette
    want = [255, 255 - (255 - front) / 3, 255 - (255 - front) * 2 / 3, front]
    np.testing.assert_allclose(open_image(image)[0, :, 0], want, atol=1)


def test_premultiplied_alpha_is_laid_on_white():
    for mode in ("LA", "RGBA"):
        image = Image.new(mode, (2, 2), (0, 85) if mode == "LA" else (0, 0, 0, 85))
        premultiplied = image.convert(mode[:-1] + "a")
        np.testing.assert_array_equal(open_image(premultiplied), 170)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_color_becomes_white(mode: str):
    """tRNS: one colour of an opaque mode is declared transparent."""
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0) if mode != "1" else (255, 255, 255))
    image = image.convert(mode)
    first = image.getpixel((0, 0))
    data = encoded(image, "PNG", transparency=first)
    pixels = open_image(data)
    np.testing.assert_array_equal(pixels[0, 0], [255, 255, 255])
    if mode in ("P", "RGB"):
        np.testing.assert_array_equal(pixels[0, 1], [255, 0, 0])


def test_one_bit_and_palette():
    bits = RGB[:, :, 0] > 127
    pixels = open_image(encoded(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat(bits[:, :, None] * np.uint8(255), 3, 2))
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(
        open_image(encoded(palette, "PNG")), np.array(palette.convert("RGB"))
    )


def test_cmyk_is_as_the_same_picture_in_rgb():
    data = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(open_image(data).astype(int) - SMOOTH).mean() < 6


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        pixels = open_image(data)
        assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 12, form


@given(
    hnp.arrays(
        np.uint8,
        st.one_of(
            st.tuples(st.integers(1, 9), st.integers(1, 9)),
            st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])),
        ),
    )
)
def test_arrays(array: np.ndarray):
    pixels = open_image(array)
    assert pixels.shape == (*array.shape[:2], 3)
    assert pixels.dtype == np.uint8
    if array.ndim == 3 and array.shape[2] == 3:
        np.testing.assert_array_equal(pixels, array)
    if array.ndim == 2:
        np.testing.assert_array_equal(pixels[:, :, 1], array)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (RGB.astype(np.float32), "an array of float32, expected uint8"),
        (RGB.transpose(2, 0, 1), "an array of shape [3, 24, 32], expected [H, W, 3]"),
        (RGB[None], "an array of shape [1, 24, 32, 3]"),
        (RGB[:0], "an array of shape [0, 32, 3]"),
        (RGB[0, 0], "an array of shape [3]"),
    ],
)
def test_bad_arrays(array: np.ndarray, said: str):
    assert said in refused(array)


def test_paths_that_lead_nowhere(tmp_path: Path):
    assert "no such file" in refused(tmp_path / "absent.png")
    assert "no such file" in refused(tmp_path / "absent" / "a.png")
    assert "a folder" in refused(tmp_path)
    assert "URLs are not fetched" in refused("https://example.com/cat.png")
    assert "unsupported image type: NoneType" in refused(None)
    assert "unsupported image type: list" in refused(["a.png"])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_half_a_file_is_refused(form: str, share: float, monkeypatch: pytest.MonkeyPatch):
    """Also in a program that told Pillow to be content with half a picture."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    big = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(big), form)
    message = refused(data[: int(len(data) * share)])
    assert "damaged or truncated" in message
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_an_image_without_its_palette_is_refused():
    data = encoded(Image.fromarray(SMOOTH).quantize(), "PNG")
    open_image(data)
    at = data.index(b"PLTE") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    without = data[:at] + data[end:]
    assert code_of(without) == "image.damaged"
    assert code_of(Image.open(io.BytesIO(without))) == "image.damaged"


def test_only_the_promised_formats_are_read():
    """Pillow's reader of EPS starts Ghostscript, and few need the others."""
    for form in ("PPM", "TGA", "EPS", "PDF", "ICO"):
        assert code_of(encoded(Image.fromarray(SMOOTH), form)) == "image.unsupported-format", form
    assert code_of(encoded(Image.fromarray(SMOOTH), "PCX")) == "image.not-a-picture"


def test_pictures_are_decoded_side_by_side(monkeypatch: pytest.MonkeyPatch):
    """Pillow's settings are strict while any thread decodes, and then as the program set them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    meeting = threading.Barrier(2, timeout=10)
    load = ImageFile.ImageFile.load

    def met(self: ImageFile.ImageFile) -> object:
        meeting.wait()
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", met)
    data = encoded(Image.fromarray(RGB), "BMP")
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(open_image(data))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_001, 10_000), (12_000, 9_000)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]):
    """With the exact numbers. Pillow's own warning (over 89 million pixels) and error (over 179)
    must not show."""
    limit = Image.MAX_IMAGE_PIXELS
    width, height = size
    message = refused(png_header(width, height))
    assert f"{width}x{height} is {width * height:,} pixels" in message
    assert "100,000,000" in message
    assert code_of(png_header(width, height)) == "image.too-large"
    assert limit == Image.MAX_IMAGE_PIXELS


def test_just_under_the_limit_is_read_without_a_warning():
    image = Image.new("1", (10_000, 9_500))
    assert MAX_PIXELS > 10_000 * 9_500
    assert open_image(encoded(image, "PNG")).shape == (9_500, 10_000, 3)


def test_a_strip_past_the_longest_side_is_refused_before_it_is_decoded():
    strip = np.zeros((1, MAX_SIDE + 1, 3), np.uint8)
    for source in (png_header(MAX_SIDE + 1, 4), strip, strip.transpose(1, 0, 2)):
        assert "65,536" in refused(source)
        assert code_of(source) == "image.too-large"
    assert open_image(strip[:, :-1]).shape == (1, MAX_SIDE, 3)


def test_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch):
    def convert(self: Image.Image, mode: str) -> Image.Image:
        raise ValueError(f"conversion from {self.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    assert "pixels of mode LAB are not supported" in refused(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("pillow/hopper_orientation_6.jpg", "pillow/hopper.jpg"),
        ("pillow/hopper.png", "pillow/hopper.jpg"),
        ("pillow/hopper.webp", "pillow/hopper.jpg"),
        ("pillow/pil_sample_cmyk.jpg", "pillow/pil_sample_rgb.jpg"),
    ],
)
def test_real_pictures_look_alike(name: str, like: str):
    """The same picture in two forms: upright, in colour, not inverted."""
    ours, theirs = open_image(real(name)), open_image(real(like))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).mean() < 8


def test_every_real_picture_opens():
    if REAL is None:
        pytest.skip("no shared test data")
    files = [path for path in REAL.rglob("*") if path.suffix in (".png", ".jpg", ".webp")]
    assert files
    for path in files:
        pixels = open_image(path)
        with Image.open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
        assert pixels.shape == (height, width, 3), path.name
        assert pixels.flags.c_contiguous
