"""What lies in the place of a file: a pipe, a device, a web page, a pointer, nothing that opens."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import write_prefix_checkpoint
from vlmport.bundle import Bundle
from vlmport.checkpoint import Weights
from vlmport.errors import VlmportError
from vlmport.files.foreign import is_web_page
from vlmport.files.json_files import load_json
from vlmport.files.onnx_file import read_onnx
from vlmport.runtime.graphs.sessions import open_session
from vlmport.text.tokenizer import read_tokenizer

# Each file by who reads it; a library would wait at a pipe for ever.
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_json,
    "model.safetensors": lambda path: Weights.open(path.parent),
    "tokenizer.json": lambda path: read_tokenizer(path.parent),
    "model.onnx": read_onnx,
    "decoder.onnx": open_session,
    "vlmport.json": lambda path: Bundle.open(path.parent),
}
PAGES = [
    b"<!DOCTYPE html><html></html>",
    b"\xef\xbb\xbf\n  <!doctype HTML>\n",
    b"<html lang=en>",
    b"<!-- app -->\n<!-- b -->\n<!doctype html>",
    b"<HEAD><title>Log in</title>",
]


def code_of(name: str, path: Path) -> str | None:
    with pytest.raises(VlmportError) as caught:
        READERS[name](path)
    assert name in str(caught.value) or str(path.parent) in str(caught.value)
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize("name", READERS)
def test_a_web_page_a_pointer_and_a_pipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(PAGES[0])
    assert code_of(name, path) == "source.web-page"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    assert code_of(name, path) == "source.lfs-pointer"
    path.unlink()
    os.mkfifo(path)
    code_of(name, path)  # by whatever words, and at once


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user, say; it is not told to be missing."""
    path = tmp_path / name
    path.write_bytes(b"{}")
    opened = Path.open

    def forbidden(self: Path, *args: object, **options: object) -> object:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(Path, "open", forbidden)
    assert code_of(name, path) == "source.unreadable"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    codes = {}
    for name in ("folder", "loop", "none", "x" * 300):
        with pytest.raises(VlmportError) as caught:
            load_json(tmp_path / name)
        codes[name[:6]] = caught.value.code
    with pytest.raises(VlmportError) as caught:
        load_json(Path("/dev/zero"))
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    assert caught.value.code == codes["folder"] == "source.not-a-file"
    assert codes["loop"] == codes["xxxxxx"] == "source.unreadable"
    assert codes["none"] == "source.missing-file"


def test_web_pages_are_known_and_data_is_none() -> None:
    assert all(map(is_web_page, PAGES))
    data = [b"", b"{}", b"[1]", b"<svg></svg>", b"<image>", b"<heading>", b'{"a": "<html>"}']
    assert not any(map(is_web_page, data))


def test_a_checkpoint_with_a_page_in_it(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").write_bytes(PAGES[3])
    with pytest.raises(VlmportError) as caught:
        Weights.open(folder)
    assert caught.value.code == "source.web-page"
