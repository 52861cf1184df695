"""Read images from `file:` and `data:` addresses; nothing is fetched.

`data:` is read as browsers read it: percent signs, base64 with spaces and without padding, and any
media type; the bytes themselves say which format they have.

Source: WHATWG, Fetch, "data: URLs", and Infra, "forgiving-base64 decode".
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import PurePath
from urllib.parse import unquote_to_bytes, urlsplit

from vlmport.errors import ImageError, cut, quoted

SCHEME = re.compile(r"\s*(data|blob|file|[a-z][a-z0-9+.-]+(?=:/))(?=:)", re.IGNORECASE)
BASE64 = re.compile(r";[ \t]*base64[ \t]*$", re.IGNORECASE)
SPACE = re.compile(rb"[\t\n\f\r ]+")
ODD = re.compile(rb"[^A-Za-z0-9+/]")
LONGEST_PATH = 4096  # no system opens a longer one
AS_BASE64 = '{"type": "image", "base64": "…"} or "data:image/png;base64,…"'


def local_source(source: str | os.PathLike[str]) -> str | bytes:
    """Return the path of a `file:` address, the bytes of a `data:` address, or a path as it is.

    Raises ImageError for other addresses, and for those that can't be read.
    """
    name = os.fspath(source)
    found = SCHEME.match(name)
    scheme = found[1].lower() if found else None
    if scheme == "file":
        return path_of(name.strip())
    if scheme == "data":
        if isinstance(source, PurePath):
            raise ImageError(
                f"{quoted(name, 40)}: a data: address in a Path, which changes its slashes",
                hint="give it as a str",
                code="image.address-in-path",
            )
        return bytes_of(name)
    if scheme is not None:
        raise ImageError(
            f"{cut(name)}: URLs are not fetched",
            hint="download it and give its path",
            code="image.url",
        )
    if len(name) > LONGEST_PATH:
        raise ImageError(
            f"{quoted(name, 40)}: {len(name)} characters, too long for a path",
            hint=f"give an image in base64 as {AS_BASE64}",
            code="image.not-a-path",
        )
    return name


def is_address(text: str) -> bool:
    """Whether a text is an address of any scheme, and not a path."""
    return SCHEME.match(text) is not None and len(text.split()) == 1


def path_of(address: str) -> str:
    """Return the path of a `file:` address. Raises ImageError for another machine's."""
    parts = urlsplit(address)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageError(
            f"{cut(address)}: a file on another machine",
            hint="begin a path on this machine with three slashes: file:///home/…",
            code="image.file-elsewhere",
        )
    from urllib.request import url2pathname  # it imports ssl and http: 30 ms

    return url2pathname(parts.path)


def bytes_of(address: str) -> bytes:
    """Return the bytes of a `data:` address. Raises ImageError where it has none."""
    address = re.sub(r"[\t\n\r]", "", address.strip()).partition("#")[0]
    head, comma, body = address.partition(",")
    if not comma:
        raise ImageError(
            f"{quoted(address, 40)}: a data: address without the comma before its data",
            hint="for example data:image/png;base64,iVBORw0…",
            code="image.bad-data-address",
        )
    data = unquote_to_bytes(body)
    return from_base64(data) if BASE64.search(head) else data


def from_base64(text: str | bytes) -> bytes:
    """Decode base64, with spaces and line breaks, and with or without padding.

    Raises ImageError for other characters.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    data = SPACE.sub(b"", data)
    if len(data) % 4 == 0:
        data = data.removesuffix(b"=").removesuffix(b"=")
    odd = ODD.search(data)
    try:
        if odd is not None:
            raise binascii.Error(f"{odd[0]!r} at {odd.start()}")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(
            f"not base64: {error}",
            hint="check that it is complete; base64.b64encode(…).decode() writes base64",
            code="image.bad-base64",
        ) from None
