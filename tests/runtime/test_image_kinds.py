"""Files that are no picture, or one of a format that is not read: each is named."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vlmport.errors import ImageError
from vlmport.runtime.images.kinds import HINT_VIDEO
from vlmport.runtime.images.reading import open_image

NOTHING, FORMAT = "image.not-a-picture", "image.unsupported-format"


def heif(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1"


@pytest.mark.parametrize(
    ("data", "said", "code"),
    [
        (b"", "0 bytes", "image.empty"),
        (b"%PDF-1.7 \n", "PDF", FORMAT),
        (b"<!doctype html><html>", "a web page", NOTHING),
        (b'  <svg xmlns="x">', "SVG", FORMAT),
        (b'<?xml version="1.0"?>\n<!-- drawn --><svg width="1">', "SVG", FORMAT),
        (b'<?xml version="1.0"?>\n<!-- ' + b"drawn " * 50 + b"--><svg>", "SVG", FORMAT),
        (b'<?xml version="1.0"?><rss>', "XML", NOTHING),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS", NOTHING),
        (heif(b"heic"), "HEIC", FORMAT),
        (heif(b"mif1"), "HEIC", FORMAT),
        (heif(b"crx "), "raw", FORMAT),
        (heif(b"M4A "), "sound", NOTHING),
        (heif(b"mp42"), "a video", NOTHING),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a video", NOTHING),
        (b"RIFF\0\0\0\0AVI LIST", "a video", NOTHING),
        (b"RIFF\0\0\0\0WAVEfmt ", "sound", NOTHING),
        (b"\xff\x0a\0\0", "JPEG XL", FORMAT),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", FORMAT),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", FORMAT),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000", FORMAT),
        (b"II*\0\x10\0\0\0CR\2\0", "raw", FORMAT),
        (b"FUJIFILMCCD-RAW 0201", "raw", FORMAT),
        (b"8BPS\0\1", "PSD", FORMAT),
        (b"\0\0\1\0\1\0\x10\x10", "ICO", FORMAT),
        (b"P6\n2 2\n255\n", "Netpbm", FORMAT),
        (b"v/1\x01\2\0\0\0", "OpenEXR", FORMAT),
        (b"qoif\0\0\0\2", "QOI", FORMAT),
        (bytes(128) + b"DICM", "DICOM", FORMAT),
        (b"\1\0\0\0" + bytes(36) + b" EMF", "EMF", FORMAT),
        (b"once upon a time", "text", NOTHING),
        (b"\x01\x02\x03\x04\x05\x06\x07\x08\x09", "begins", NOTHING),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path: Path, data: bytes, said: str, code: str):
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert caught.value.code == code
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.hint
        assert (caught.value.hint == HINT_VIDEO) is ("a video" in said)
        if source is path:
            assert str(path) in str(caught.value)


@pytest.mark.parametrize("tags", [{50706: b"\1\4\0\0"}, {254: 1}])
def test_the_preview_of_a_raw_file_is_not_taken_for_the_picture(tags: dict[int, object]):
    """Raw files of cameras (DNG, NEF, ARW) are TIFFs that begin with a small picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "TIFF", tiffinfo=tags)
    with pytest.raises(ImageError, match="raw") as caught:
        open_image(file.getvalue())
    assert caught.value.code == FORMAT


class FakeHeif(ImageFile.ImageFile):
    """Reads `heif(b"heic")` as one grey pixel, in the way of pillow-heif's plugin."""

    format = "HEIF"

    def _open(self) -> None:
        self._size, self._mode = (1, 1), "RGB"
        self.tile = []
        self.im = Image.new("RGB", (1, 1), (7, 8, 9)).im


def register() -> None:
    Image.register_open("HEIF", FakeHeif, lambda head: head[8:12] == b"heic")


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither pillow-heif nor a plugin, and none afterwards."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    yield
    Image.OPEN.pop("HEIF", None)
    Image.ID[:] = [name for name in Image.ID if name != "HEIF"]


@pytest.mark.usefixtures("without_heif")
def test_heic_is_read_where_a_plugin_is_registered_or_installed(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ImageError, match="HEIC") as caught:
        open_image(heif(b"heic"))
    assert "pillow-heif" in str(caught.value.hint)
    register()
    np.testing.assert_array_equal(open_image(heif(b"heic")), [[[7, 8, 9]]])
    Image.OPEN.pop("HEIF")
    installed = types.ModuleType("pillow_heif")
    installed.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", installed)
    np.testing.assert_array_equal(open_image(heif(b"heic")), [[[7, 8, 9]]])
