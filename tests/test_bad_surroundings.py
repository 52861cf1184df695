"""Full disks, Ctrl-C, no network, no such device, wrong options: one line, a hint, nothing lost."""

from __future__ import annotations

import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tests.checkpoints import write_prefix_checkpoint
from tests.exporter.comparing import contents
from tests.hub import Hub, hub_environment
from tests.processes import started
from tests.test_bad_input import one_line, refused, refused_in_subprocess
from vlmport import cli

MAIN = "from vlmport.cli import main; main()"
INLINE = "from vlmport.exporter import writing; writing.INLINE_BYTES = 0;" + MAIN
CLOSED = "http://127.0.0.1:9"  # the port of 'discard', where nobody listens


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Disk

# What fills the disk → the largest file that may be written, and the program.
FULL = {
    "a graph": (300_000, MAIN),
    "external data": (300_000, INLINE),
    "the tokenizer": (900_000, MAIN),
}


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of 380 kB and more, and a tokenizer.json of more than a megabyte."""
    folder = tmp_path_factory.mktemp("wide") / "captioner"
    write_prefix_checkpoint(folder, text={"vocab_size": 3500})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<{'x' * 300}{i}>" for i in range(3000)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("limit", "code"), FULL.values(), ids=FULL)
def test_a_full_disk(
    limit: int, code: str, wide_checkpoint: Path, own_bundle_folder: Path, tmp_path: Path
) -> None:
    """The system refuses to let a file grow, as it does on a disk that is full."""
    before = contents(tmp_path)
    error, hint = refused_in_subprocess(
        ["export", wide_checkpoint, own_bundle_folder, "--force", "--precision", "fp32"],
        code,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert error.startswith(f"error[export.disk-full]: {own_bundle_folder}: ")
    assert "free some space" in hint
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["own-bundle"]


def test_a_full_disk_under_the_cache(tiny_checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    error, _ = refused_in_subprocess(
        ["caption", picture, "-m", tiny_checkpoint],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert "the disk is full; " in error
    assert not (tmp_path / "cache").exists()


def test_an_unwritable_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    error, _ = refused(tmp_path, "export", tiny_checkpoint, tmp_path / "file")
    assert "file: is a file, expected a folder" in error
    error, _ = refused(tmp_path, "export", tiny_checkpoint, tmp_path / "file/deeper")
    assert "file: is a file, expected a folder" in error
    if sys.platform == "linux":
        error, _ = refused(tmp_path, "export", tiny_checkpoint, "/proc/nowhere/out")
        assert "/proc/nowhere" in error


# Ctrl-C

INTERRUPTED = """
import sys
from vlmport import cli
from vlmport.exporter import exporter
stage = sys.argv.pop()
def wait(*args, **kwargs):
    import time
    print("waiting", flush=True)
    time.sleep(30)
setattr(exporter, stage, wait)
cli.main()
"""


@pytest.mark.parametrize("stage", ["write_model", "record"])
def test_ctrl_c_over_an_old_bundle(
    stage: str, tiny_checkpoint: Path, own_bundle_folder: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    arguments = ["export", str(tiny_checkpoint), str(own_bundle_folder), "--force", stage]
    with started([sys.executable, "-c", INTERRUPTED, *arguments]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["own-bundle"]


# Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    weights = safetensors.numpy.save({"weight": np.zeros(1, np.float32)})
    files = {"config.json": b'{"model_type": "blip"}', "model.safetensors": weights}
    with Hub.serving(files) as hub:
        yield hub


def ask_hub(
    model: str, picture: Path, folder: Path, endpoint: str, **variables: str
) -> tuple[str, str]:
    """The CLI in a process of its own: the Hub client reads its settings once."""
    environment = hub_environment(folder / "hub", endpoint) | variables
    return refused_in_subprocess(
        ["caption", picture, "--model", model], env=environment, cwd=folder
    )


def test_a_hub_id_that_is_not_there(hub: Hub, picture: Path, tmp_path: Path) -> None:
    error, hint = ask_hub("org/missing", picture, tmp_path, hub.url)
    assert f"org/missing: no such folder, and no such model at {hub.url}" in error
    assert "check the spelling" in hint


def test_the_hub_offline(picture: Path, tmp_path: Path) -> None:
    error, hint = ask_hub("org/name", picture, tmp_path, CLOSED, HF_HUB_OFFLINE="1")
    assert re.match(r"error\[hub\.offline\]: org/name: .*HF_HUB_OFFLINE is set", error)
    assert "unset HF_HUB_OFFLINE" in hint


def test_no_network(picture: Path, tmp_path: Path) -> None:
    error, hint = ask_hub("org/name", picture, tmp_path, CLOSED)
    assert f"org/name: can't be fetched from {CLOSED}" in error
    assert "check the network" in hint


def test_a_hub_model_that_is_not_supported(hub: Hub, picture: Path, tmp_path: Path) -> None:
    error, hint = ask_hub("org/name", picture, tmp_path, hub.url)
    assert "model_type 'blip' is not supported" in error
    assert hint.startswith("hint: supported: prefix_conditioning_vlm, idefics3")


# Devices and options


def test_a_device_that_is_not_here(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    device = "directml" if sys.platform != "win32" else "coreml"
    error, hint = refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--device", device)
    assert f"device '{device}' needs " in error
    assert "pip install onnxruntime" in hint
    error, hint = refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--device", "cudo")
    assert "device 'cudo' is unknown (did you mean 'cuda'?)" in error
    assert "known: cpu, cuda" in hint
    refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--device", "cpu:x")
    arguments = ["inspect", str(tiny_bundle), "--probe", "--device", device]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert f"device '{device}' needs " in one_line(done.exit_code, "", done.stderr)[0]


@pytest.mark.parametrize("wrong", ["fp31", "q4f17", "vision=fp31", "sight=q4", "="])
def test_an_unknown_precision(
    wrong: str, tiny_bundle: Path, tiny_checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    error, _ = refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--precision", wrong)
    assert "precision" in error
    error, hint = refused(tmp_path, "export", tiny_checkpoint, tmp_path / "o", "-p", wrong)
    assert f"unknown precision {wrong!r}" in error
    assert hint == "hint: choose from fp32, fp16, q8, q4, q4f16"
    arguments = ["verify", tiny_bundle, "--reference", tiny_checkpoint, "--precision", wrong]
    error, _ = refused(tmp_path, *arguments)
    assert "precision" in error


def test_options_that_contradict_each_other(
    tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    error, hint = refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--stream", "--json")
    assert "--stream and --json contradict each other" in error
    assert hint == "hint: leave one of them out"
    refused(tmp_path, "caption", picture, "-m", tiny_bundle, "--revision", "v2")
    error, _ = refused(tmp_path, "caption", picture, "-m", "shapes", "--revision", "v2")
    assert "has no revision 'v2'" in error


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--max-new-tokens=x", "--threads=-1"])
def test_values_out_of_range(option: str, tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    arguments = ["caption", str(picture), "-m", str(tiny_bundle), option]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (2, "")
    name = option.partition("=")[0]
    assert (
        f"Invalid value for '{name}'" in done.stderr
        or f"error[option.wrong-value]: {name} " in done.stderr
    )


def test_verify_of_another_checkpoint(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = contents(tiny_bundle)
    error, _ = refused(tmp_path, "verify", tiny_bundle, "--reference", tmp_path / "nowhere")
    assert "nowhere: no such folder" in error
    error, _ = refused(tmp_path, "verify", tiny_checkpoint, "--reference", tiny_checkpoint)
    assert "no vlmport.json" in error
    assert contents(tiny_bundle) == before


def test_one_line_knows_what_it_looks_for() -> None:
    one_line(2, "", "error[a.b]: what\nhint: do\n")
    for code, out, err in [
        (1, "", "error[a.b]: what\nhint: do\n"),
        (2, "text", "error[a.b]: what\nhint: do\n"),
        (2, "", "error: what\nhint: do\n"),
        (2, "", "error[a.b]: what\n"),
        (2, "", "Traceback\nerror[a.b]: what\nhint: do\n"),
        (2, "", "error[a.b]: what\nhint: \n"),
    ]:
        with pytest.raises((AssertionError, ValueError)):
            one_line(code, out, err)
