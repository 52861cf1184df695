"""Check a file from elsewhere before a library opens it.

A library would wait forever at a pipe, and its errors don't explain what a failed download leaves
instead of a file: a Git LFS pointer, or the web page of a proxy, a login or a server.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from vlmport.errors import VlmportError

__all__ = ["WEB_PAGE_HINT", "check_file", "is_web_page"]

WEB_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.{0,500}?-->\s*)*<(?:!doctype\s+html|html|head)\b"
)
WEB_PAGE_HINT = (
    "check whether a proxy or a login answers instead of the server; then download it again"
)
HEAD_BYTES = 1024
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_file(path: Path, error: type[VlmportError], *, hint: str, what: str = "the file") -> None:
    """Raise `error` unless this is a readable file, and not a web page or a Git LFS pointer."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind != stat.S_IFREG:
            found = KINDS.get(kind, "something else")
            raise error(f"{path}: {found}, expected a file", hint=hint, code="source.not-a-file")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise error(f"{path}: no such file", hint=hint, code="source.missing-file") from None
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        reason = getattr(cause, "strerror", None) or cause
        raise error(
            f"{str(path)[:500]}: can't be read: {reason}",
            hint="check the permissions of the file and of its folders",
            code="source.unreadable",
        ) from cause
    if head.startswith(b"version https://git-lfs"):
        raise error(
            f"{path}: a Git LFS pointer ({path.stat().st_size} bytes), not {what}",
            hint="run `git lfs pull` in the folder, or download the file again",
            code="source.lfs-pointer",
        )
    if is_web_page(head):
        raise error(f"{path}: a web page, not {what}", hint=WEB_PAGE_HINT, code="source.web-page")


def is_web_page(head: bytes) -> bool:
    """Whether these are the first bytes of an HTML document."""
    return WEB_PAGE.match(head.lower()) is not None
