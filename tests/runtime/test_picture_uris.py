"""Addresses of pictures: what is read, and what is refused by name."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vlmport.errors import ImageError
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.images.uris import local_source

BYTES = bytes(range(256))
TEXT = base64.b64encode(BYTES).decode()


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (f"data:image/png;base64,{TEXT}", BYTES),
        (f"DATA:;BASE64,{TEXT.rstrip('=')}", BYTES),  # no padding, no media type
        (f"data:text/html;charset=utf-8; base64 ,{TEXT[:9]}\n {TEXT[9:]}", BYTES),
        (f"  data:image/png;base64,{TEXT}\n", BYTES),
        ("data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2f"), BYTES),
        ("data:image/png;base64,YQ%3D%3D", b"a"),
        ("data:,a%20b%GG%", b"a b%GG%"),
        ("data:image/svg+xml;name=a.png,<svg>#part", b"<svg>"),
        ("data:;base64=no,YQ==", b"YQ=="),
        ("data:,\u00e9", "\u00e9".encode()),
    ],
)
def test_data_is_read_as_browsers_read_it(address: str, data: bytes) -> None:
    assert local_source(address) == data


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("data:image/png;base64", "image.bad-data-address"),
        ("data:image/png;base64,a-_b", "image.bad-base64"),
        ("data:image/png;base64,abcde", "image.bad-base64"),
        ("data:image/png;base64,a=bc", "image.bad-base64"),
        ("http://example.org/a.png", "image.url"),
        ("HTTPS://example.org/a.png", "image.url"),
        ("s3://bucket/a.png", "image.url"),
        ("blob:https://a/b", "image.url"),
        (Path("https://example.org/a.png"), "image.url"),
        (Path("data:image/png;base64,AA//AA"), "image.address-in-path"),
        ("file://server/share/a.png", "image.file-elsewhere"),
        (TEXT * 20, "image.not-a-path"),
        ("data:image/png;base64," + "A" * 4_000_001, "image.bad-base64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_others_are_refused_in_a_short_message(address: str | Path, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(address)
    assert caught.value.code == code
    assert caught.value.hint
    assert len(str(caught.value)) < 300


def test_paths_stay_as_they_are(tmp_path: Path) -> None:
    for path in ("a.png", "C:\\a.png", "c:/a.png", "a:b", "~/a.png", str(tmp_path)):
        assert local_source(path) == path
    assert local_source("file:a%20b.png?x#y") == "a b.png"
