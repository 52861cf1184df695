"""Bad input, end to end: one line that says what is wrong, a hint, exit code 2, nothing lost."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.checkpoints import write_json, write_prefix_checkpoint, write_weights
from tests.exporter.comparing import contents
from tests.exporter.test_same_model import write_adapter
from vlmport import cli
from vlmport.bundle import MANIFEST, hash_folder, read_manifest, write_manifest
from vlmport.exporter import export, writing

ROOT = Path(__file__).parents[1]
DECODER = "onnx/decoder_model_merged_q4.onnx"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to be broken."""
    return write_prefix_checkpoint(tmp_path / "captioner")


def one_line(code: int, out: str, err: str) -> tuple[str, str]:
    """Return the error, with its code, and the hint, after a check of their form."""
    assert code == 2, err
    assert out == ""
    error, hint = err.splitlines()
    assert re.match(r"error\[[a-z]+\.[a-z0-9-]+\]: ", error)
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ")
    return error, hint


def refused(folder: Path, *arguments: object) -> tuple[str, str]:
    """Run the CLI on bad input; every file under `folder` has to stay as it is."""
    before = contents(folder)
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)
    assert contents(folder) == before
    return one_line(done.exit_code, done.stdout, done.stderr)


def refused_in_subprocess(
    arguments: list[object], code: str = "from vlmport.cli import main; main()", **options: Any
) -> tuple[str, str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **{"cwd": ROOT, **options}
    )
    return one_line(done.returncode, done.stdout, done.stderr)


# Pictures


def png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel, compressed row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    row = bytes(1 + (width + 7) // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def write_truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1500])


# Name → how to write it, the code of its error, and a fact of the message.
PICTURES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "text.png": (lambda path: path.write_text("I am no picture"), "not-a-picture", "text"),
    "page.jpg": (lambda path: path.write_text("<!DOCTYPE html>"), "not-a-picture", "a web page"),
    "cut.jpg": (write_truncated_jpeg, "damaged", ""),
    "empty.png": (lambda path: path.write_bytes(b""), "empty", "0 bytes"),
    "folder.png": (lambda path: path.mkdir(), "is-a-folder", ""),
    "missing.png": (lambda path: None, "not-found", ""),
    "cut.png": (lambda path: path.write_bytes(png(9000, 9000)[:5000]), "damaged", ""),
}


@pytest.mark.parametrize("how", ["", "--stream"])
@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture(name: str, how: str, tiny_bundle: Path, tmp_path: Path) -> None:
    write, code, fact = PICTURES[name]
    write(tmp_path / name)
    options = ["--model", tiny_bundle, *([how] if how else [])]
    error, _ = refused(tmp_path, "caption", tmp_path / name, *options)
    assert error.startswith(f"error[image.{code}]: {tmp_path / name}: ")
    assert fact in error


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture_has_a_row_of_json(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    write, code, fact = PICTURES[name]
    path = tmp_path / name
    write(path)
    done = CliRunner().invoke(cli.app, ["caption", str(path), "--json", "-m", str(tiny_bundle)])
    assert done.exit_code == 2
    row = json.loads(done.stdout)
    assert row["image"] == str(path)
    assert row["error"].keys() == {"code", "message", "hint"}
    assert row["error"]["code"] == f"image.{code}"
    assert fact in row["error"]["message"]
    one_line(2, "", done.stderr)  # and the line on stderr, as ever


PEAK = """
import atexit, re, sys
from vlmport.cli import main
def tell():
    # Not ru_maxrss: a child's begins at its parent's.
    with open("/proc/self/status") as status, open(sys.argv[-1] + ".peak", "w") as file:
        file.write(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
atexit.register(tell)
main()
"""


def test_a_bomb_is_refused_before_it_costs_memory(tiny_bundle: Path, tmp_path: Path) -> None:
    """30,000 x 30,000 pixels in a small file: 900 MB once decoded."""
    bomb = png(30_000, 30_000)
    assert len(bomb) < 1_000_000
    (tmp_path / "bomb.png").write_bytes(bomb)
    arguments = ["caption", "--model", tiny_bundle, tmp_path / "bomb.png"]
    error, hint = refused_in_subprocess(arguments, PEAK)
    assert error.startswith("error[image.too-large]")
    assert re.search(r"30000x30000 .* 900,000,000 .* 100,000,000", error)
    assert "scale the image down" in hint
    assert int((tmp_path / "bomb.png.peak").read_text()) < 500_000  # kilobytes


# Models


def test_a_model_that_is_nowhere(picture: Path, tmp_path: Path) -> None:
    error, _ = refused(tmp_path, "caption", picture, "--model", tmp_path / "nowhere")
    assert "nowhere: no such folder" in error
    error, hint = refused(tmp_path, "caption", picture, "--model", "shaeps")
    assert (
        "'shaeps': neither a built-in name, a folder nor a Hub id (did you mean 'shapes'?)" in error
    )
    assert "org/name" in hint


def test_a_folder_without_a_config(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("hello", encoding="utf-8")
    for arguments in (["caption", picture, "-m"], ["export"]):
        rest = [tmp_path / "out"] if arguments == ["export"] else []
        error, _ = refused(tmp_path, *arguments, tmp_path / "folder", *rest)
        assert "folder: no config.json; it has 'notes.txt'" in error


def test_an_unknown_model_type_lists_the_supported(checkpoint: Path, tmp_path: Path) -> None:
    write_json(checkpoint / "config.json", {"model_type": "blip"})
    error, hint = refused(tmp_path, "export", checkpoint, tmp_path / "out")
    assert "model_type 'blip' is not supported" in error
    assert hint.startswith("hint: supported: prefix_conditioning_vlm, idefics3")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}', "\udcff"])
def test_a_config_that_is_none(text: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    error, _ = refused(tmp_path, "export", checkpoint, tmp_path / "out")
    assert "config.json" in error


def spoil_weights(tensors: dict[str, np.ndarray]) -> None:
    tensors["projection.projection.wieght"] = tensors.pop("projection.projection.weight")
    tensors["projection.projection.bias"] = np.zeros((2, 16), np.float32)


@pytest.mark.parametrize("command", ["export", "caption"])
def test_weights_that_do_not_fit(
    command: str, checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    spoil_weights(tensors)
    write_weights(checkpoint, tensors)
    arguments = ["export", checkpoint, tmp_path / "out"]
    if command == "caption":
        arguments = ["caption", picture, "-m", checkpoint]
    error, _ = refused(tmp_path, *arguments)
    assert "'projection.projection.weight' (did you mean 'projection.projection.wieght'?)" in error
    assert "'projection.projection.bias' [2, 16], expected [32]" in error
    assert re.search(r"; 1 tensors .*: 'projection\.projection\.wieght'$", error.strip())


def test_weights_that_are_cut_or_gone(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    for damage in (content[:-100], content[:20], b"", b"version https://git-lfs.github.com/spec"):
        weights.write_bytes(damage)
        error, _ = refused(tmp_path, "export", checkpoint, tmp_path / "out")
        assert "model.safetensors" in error
    weights.unlink()
    error, _ = refused(tmp_path, "export", checkpoint, tmp_path / "out")
    assert "expected model.safetensors" in error


def test_an_adapter_of_another_shape(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 64, "head_dim": 16}
    adapter = write_adapter(
        tmp_path / "adapter", write_prefix_checkpoint(tmp_path / "other", text=text)
    )
    error, hint = refused(tmp_path, "export", checkpoint, tmp_path / "out", "--adapter", adapter)
    assert "8 of 8 LoRA pairs don't fit" in error
    assert "trained on another model" in hint
    refused(tmp_path, "caption", picture, "-m", checkpoint, "--adapter", adapter)
    error, _ = refused(tmp_path, "export", checkpoint, tmp_path / "out", "--adapter", tmp_path)
    assert "no adapter_config.json" in error


def test_an_adapter_for_a_bundle(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    error, _ = refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--adapter", tmp_path)
    assert "an adapter can't be merged into a bundle" in error


@pytest.mark.parametrize("damage", ["missing", "{}", "not json", ""])
def test_a_tokenizer_that_is_none(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    if damage != "missing":
        (checkpoint / "tokenizer.json").write_text(damage, encoding="utf-8")
    error, _ = refused(tmp_path, "export", checkpoint, tmp_path / "out")
    assert "tokenizer.json" in error


# Bundles


def make_garbage(path: Path) -> None:
    """Other bytes of the same number."""
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "file", [DECODER, "onnx/image_processor.onnx", "onnx/embed_tokens_q4.onnx"]
)
def test_a_graph_of_garbage(
    file: str, own_bundle_folder: Path, picture: Path, tmp_path: Path
) -> None:
    make_garbage(own_bundle_folder / file)
    error, hint = refused(tmp_path, "caption", picture, "-m", own_bundle_folder)
    assert file in error
    assert "again" in hint
    error, _ = refused(tmp_path, "inspect", own_bundle_folder, "--probe")
    assert f"{file}: its SHA-256 is not the manifest's" in error


def test_a_graph_of_garbage_is_not_shown(own_bundle_folder: Path) -> None:
    make_garbage(own_bundle_folder / "onnx/decoder_model_merged.onnx")
    done = CliRunner().invoke(cli.app, ["inspect", str(own_bundle_folder)], catch_exceptions=False)
    one_line(done.exit_code, "", done.stderr)
    assert "decoder_model_merged.onnx: not a complete ONNX graph" in done.stderr


def test_a_cut_graph(own_bundle_folder: Path, picture: Path, tmp_path: Path) -> None:
    graph = own_bundle_folder / DECODER
    graph.write_bytes(graph.read_bytes()[:1000])
    for arguments in (["caption", picture, "-m"], ["inspect"], ["verify", "--reference", "x"]):
        error, _ = refused(tmp_path, *arguments, own_bundle_folder)
        assert f"{DECODER}: 1000 bytes, expected " in error


@pytest.fixture
def external_bundle(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose weights lie in files of their own."""
    monkeypatch.setattr(writing, "INLINE_BYTES", 0)
    return export(tiny_checkpoint, tmp_path / "external", precisions="fp32").folder


def test_external_data_that_is_cut_or_changed(
    external_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    name = "onnx/decoder_model_merged.onnx_data"
    data = external_bundle / name
    content = data.read_bytes()
    make_garbage(data)
    error, _ = refused(tmp_path, "inspect", external_bundle, "--probe")
    assert f"{name}: its SHA-256 is not the manifest's" in error
    data.write_bytes(content[:-100])
    error, _ = refused(tmp_path, "caption", picture, "-m", external_bundle)
    assert f"{name}: {len(content) - 100} bytes, expected {len(content)}" in error
    # Even where the manifest was made to agree.
    manifest = read_manifest(external_bundle / MANIFEST)
    object.__setattr__(manifest, "files", hash_folder(external_bundle))
    write_manifest(external_bundle, manifest)
    error, hint = refused(tmp_path, "caption", picture, "-m", external_bundle)
    assert "external data" in error
    assert "again" in hint
    data.unlink()
    error, _ = refused(tmp_path, "caption", picture, "-m", external_bundle)
    assert f"{name}: missing" in error


def test_a_manifest_that_is_broken_or_newer(
    own_bundle_folder: Path, picture: Path, tmp_path: Path
) -> None:
    path = own_bundle_folder / MANIFEST
    raw = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, raw | {"version": 7})
    error, hint = refused(tmp_path, "caption", picture, "-m", own_bundle_folder)
    assert "manifest version 7" in error
    assert "upgrade" in hint
    path.write_text("{", encoding="utf-8")
    error, _ = refused(tmp_path, "inspect", own_bundle_folder)
    assert "vlmport.json: not JSON" in error
    path.unlink()
    error, _ = refused(tmp_path, "inspect", own_bundle_folder, "--probe")
    assert "no vlmport.json" in error


def test_a_bundle_is_no_checkpoint(tiny_bundle: Path, tmp_path: Path) -> None:
    error, _ = refused(tmp_path, "export", tiny_bundle, tmp_path / "out")
    assert "this is a bundle already" in error


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_bundle_without_a_file(
    file: str, own_bundle_folder: Path, picture: Path, tmp_path: Path
) -> None:
    (own_bundle_folder / file).unlink()
    error, _ = refused(tmp_path, "caption", picture, "-m", own_bundle_folder)
    assert f"{file}: missing" in error
