"""The command line: data on stdout, messages on stderr, exit codes that mean something."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import vlmport
from tests.processes import started
from vlmport import cli
from vlmport.bundle import MANIFEST, Bundle
from vlmport.errors import ImageError
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[1]
COMMANDS = ["caption", "ask", "chat", "export", "verify", "eval", "inspect", "models"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own, and a terminal of a fixed width without colours."""
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "cache/bundles"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Paths of three pictures of unequal size."""
    paths = []
    for i, size in enumerate([(40, 30), (9, 70), (64, 64)]):
        y, x = np.mgrid[: size[1], : size[0]]
        rgb = np.stack([x * 3, y * 3, (x + y * i) * 2], axis=-1) % 256
        path = tmp_path / f"picture {i}.png"
        Image.fromarray(rgb.astype(np.uint8)).save(path)
        paths.append(str(path))
    return paths


def run(*arguments: object) -> Result:
    """The CLI in this process; an exception that is no exit is raised."""
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)


def in_subprocess(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmport", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, **options
    )


def captions(bundle: Path, pictures: list[str], **options: Any) -> list[str]:
    with VLM.open(bundle) as vlm:
        return [vlm.caption(path, **options).text for path in pictures]


# caption


def test_one_picture_prints_its_caption_alone(tiny_bundle: Path, pictures: list[str]) -> None:
    done = run("caption", pictures[0], "--model", tiny_bundle)
    assert done.exit_code == 0
    assert done.stdout == captions(tiny_bundle, pictures[:1])[0] + "\n"
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["caption", "ask", "chat"])
def test_hashes_are_compared_on_request(
    command: str, own_bundle_folder: Path, pictures: list[str]
) -> None:
    """A weight that a bad disk has changed still runs."""
    graph = own_bundle_folder / "onnx/decoder_model_merged.onnx"
    data = graph.read_bytes()
    at = len(data) * 3 // 4
    graph.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    given = {"caption": pictures[:1], "ask": [*pictures[:1], "?"], "chat": []}[command]
    done = run(command, *given, "-m", own_bundle_folder, "--verify-hashes")
    assert done.exit_code == 2
    assert "error[bundle.not-as-listed]" in done.stderr
    assert "onnx/decoder_model_merged.onnx" in done.stderr


def test_several_pictures_are_named(tiny_bundle: Path, pictures: list[str]) -> None:
    done = run("caption", *pictures, "-m", tiny_bundle, "--max-new-tokens", 5)
    texts = captions(tiny_bundle, pictures, max_new_tokens=5)
    assert done.stdout == "".join(f"{p}: {t}\n" for p, t in zip(pictures, texts, strict=True))
    assert len(set(texts)) > 1


def test_a_picture_given_twice_is_captioned_twice(tiny_bundle: Path, pictures: list[str]) -> None:
    done = run("caption", pictures[0], pictures[0], "-m", tiny_bundle)
    assert len(done.stdout.splitlines()) == 2


def test_more_pictures_than_a_batch(tiny_bundle: Path, pictures: list[str]) -> None:
    once = run("caption", *pictures, "-m", tiny_bundle)
    assert run("caption", *pictures * 4, "-m", tiny_bundle).stdout == once.stdout * 4


@pytest.mark.parametrize("count", [1, 3])
def test_streamed_text_is_the_same(count: int, tiny_bundle: Path, pictures: list[str]) -> None:
    arguments = ["caption", *pictures[:count], "-m", tiny_bundle, "--precision", "fp32"]
    assert run(*arguments, "--stream").stdout == run(*arguments).stdout


def test_json_lines(tiny_bundle: Path, pictures: list[str]) -> None:
    done = run("caption", *pictures, "-m", tiny_bundle, "--json", "--max-new-tokens", 4)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == pictures
    texts = captions(tiny_bundle, pictures, max_new_tokens=4)
    for row, text in zip(rows, texts, strict=True):
        assert row["caption"] == text
        assert set(row) == {
            "image", "caption", "token_ids", "stop_reason", "complete", "timings", "counts",
        }  # fmt: skip
        assert row["stop_reason"] in ("stop", "length")
        assert len(row["token_ids"]) == row["counts"]["new_tokens"] <= 4
        assert row["counts"]["image_tokens"] == 25
        assert set(row["timings"]) == {"image", "prefill", "decode"}


def test_a_checkpoint_is_exported_on_first_use(
    tiny_checkpoint: Path, pictures: list[str], cache: Path
) -> None:
    first = run("caption", pictures[0], "-m", tiny_checkpoint)
    (folder,) = cache.iterdir()
    before = (folder / MANIFEST).stat().st_mtime_ns  # the folder's own says when it was used
    assert run("caption", pictures[0], "-m", tiny_checkpoint).stdout == first.stdout
    assert list(cache.iterdir()) == [folder]
    assert before == (folder / MANIFEST).stat().st_mtime_ns


def test_precisions_are_heeded(tiny_bundle: Path, pictures: list[str]) -> None:
    for asked in ("fp32", "q4", "vision=fp32,decoder=q4"):
        with VLM.open(tiny_bundle, precision=asked) as vlm:
            expected = vlm.caption(pictures[0]).text
        done = run("caption", pictures[0], "-m", tiny_bundle, "-p", asked, "--threads", 1)
        assert done.stdout == expected + "\n"


def test_the_good_pictures_are_captioned_all_the_same(
    tiny_bundle: Path, pictures: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    paths = [pictures[0], str(tmp_path / "bad.png"), pictures[1], str(tmp_path / "none.png")]
    good = captions(tiny_bundle, pictures[:2])
    expected = f"{paths[0]}: {good[0]}\n{paths[2]}: {good[1]}\n"
    for how in ([], ["--stream"]):
        done = run("caption", *paths, "-m", tiny_bundle, *how)
        assert done.exit_code == 2
        assert done.stdout == expected
        assert done.stderr.count("error[image.") == done.stderr.count("hint: ") == 2
        assert "bad.png: not an image" in done.stderr
        assert "none.png: no such file" in done.stderr
    done = run("caption", *paths, "-m", tiny_bundle, "--json")
    assert done.exit_code == 2
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == paths
    assert [row.get("caption") for row in rows] == [good[0], None, good[1], None]
    assert [row.get("error", {}).get("code") for row in rows] == [
        None, "image.not-a-picture", None, "image.not-found",
    ]  # fmt: skip


def test_a_picture_that_the_graph_refuses_takes_no_other_with_it(
    tiny_bundle: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmport.runtime.graphs.components import Components

    process = Components.process_image

    def picky(self: Components, rgb: np.ndarray, options: Any = None) -> Any:
        if rgb.shape[:2] == (70, 9):
            raise ImageError(
                "9x70 pixels can't be processed",
                hint="check that the image is not extremely narrow",
                code="image.refused",
            )
        return process(self, rgb, options)

    good = captions(tiny_bundle, [pictures[0], pictures[2]])
    monkeypatch.setattr(Components, "process_image", picky)
    for how in ([], ["--stream"]):
        done = run("caption", *pictures, "-m", tiny_bundle, *how)
        assert done.exit_code == 2
        assert done.stdout == f"{pictures[0]}: {good[0]}\n{pictures[2]}: {good[1]}\n"
        assert done.stderr.count("error[image.refused]: ") == 1


# export, inspect, models, verify


def test_export_says_where_it_is_and_what_is_next(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run("export", tiny_checkpoint, tmp_path / "out", "--precision", "q4")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert re.search(r"out: q4, 0\.\d MB", done.stderr)
    assert f"next: vlmport verify {tmp_path / 'out'} --reference {tiny_checkpoint}" in done.stderr
    assert Bundle.open(tmp_path / "out").manifest.precisions == ("q4",)
    again = run("export", tiny_checkpoint, tmp_path / "out", "-p", "fp32")
    assert again.exit_code == 2
    assert "hint: --force overwrites it" in again.stderr
    assert run("export", tiny_checkpoint, tmp_path / "out", "-p", "fp32", "--force").exit_code == 0
    assert Bundle.open(tmp_path / "out").manifest.precisions == ("fp32",)


def test_inspect_shows_what_is_inside(tiny_bundle: Path) -> None:
    done = run("inspect", tiny_bundle)
    assert done.exit_code == 0
    for text in (
        "captioner",
        "not verified yet",
        "inputs_embeds float[batch_size, sequence_length, 32]",
        "image uint8[height, width, 3]",
        "4 cache tensors",
    ):
        assert text in done.stdout, text
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("precisions "))
    sizes = dict(part.split(" ", 1) for part in line.removeprefix("precisions").strip().split(", "))
    assert list(sizes) == ["fp32", "q8", "q4"]
    for size in sizes.values():
        assert re.fullmatch(r"\d+\.\d MB", size), line


def test_probe_runs_the_golden_input(tiny_bundle: Path) -> None:
    done = run("inspect", tiny_bundle, "--probe")
    assert done.exit_code == 0
    assert "fp32 on cpu: as recorded" in done.stdout
    assert "q4 on cpu: as recorded" in done.stdout


def test_a_probe_that_fails_exits_with_1(own_bundle_folder: Path) -> None:
    raw = json.loads((own_bundle_folder / MANIFEST).read_text(encoding="utf-8"))
    logits = raw["golden"]["expected"]["q4"]["logits"]
    logits[:] = [value + 1 for value in logits]
    (own_bundle_folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
    done = run("inspect", own_bundle_folder, "--probe")
    assert done.exit_code == 1
    assert "fp32 on cpu: as recorded" in done.stdout
    assert "q4 on cpu: first logits are off by 1" in done.stdout


def test_models_lists_what_there_is() -> None:
    done = run("models")
    assert done.exit_code == 0
    assert re.search(r"^shapes\tbuilt in: ", done.stdout, re.MULTILINE)
    assert "prefix_conditioning_vlm" in done.stdout


def test_verify_exits_by_its_result(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the ladder itself is right is tested with it."""
    asked: dict[str, Any] = {}

    class FakeReport:
        passed = False

        def to_json(self) -> dict[str, Any]:
            return {"passed": self.passed}

    def fake(bundle: Path, reference: object, **options: Any) -> FakeReport:
        asked.update(options, bundle=bundle, reference=reference)
        return FakeReport()

    monkeypatch.setattr("vlmport.parity.verify", fake)
    file = tmp_path / "result.json"
    arguments = ["verify", tiny_bundle, "--reference", "ckpt", "-p", "fp32,q4", "--json", file]
    assert run(*arguments).exit_code == 1
    assert json.loads(file.read_text(encoding="utf-8")) == {"passed": False}
    assert (asked["bundle"].folder, asked["reference"]) == (tiny_bundle, "ckpt")
    assert asked["precisions"] == ["fp32", "q4"]
    FakeReport.passed = True
    assert run(*arguments).exit_code == 0
    asked.clear()
    done = run("verify", tiny_bundle, "--reference", "ckpt", "--json", tmp_path / "no/folder.json")
    assert done.exit_code == 2
    assert asked == {}


# Options and exit codes


def test_version() -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"vlmport {vlmport.__version__}\n")


def test_help_without_a_command() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        output = run(*arguments).output
        assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert done.stdout.startswith("Usage: ")
    for line in re.findall(r"^  (-[^\n]*)", done.stdout, re.MULTILINE):
        assert re.search(r"\S  +\S", line) or len(line) > 24, f"no help text: {line}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["captoin", "x.png"],
        ["caption"],
        ["caption", "x.png", "--nothing"],
        ["caption", "x.png", "--max-new-tokens", "0"],
        ["caption", "x.png", "--max-new-tokens", "many"],
        ["caption", "x.png", "--threads", "0"],
        ["caption", "x.png", "--stream", "--json"],
        ["export", "somewhere"],
        ["verify", "bundle"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_wrong_options_exit_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert re.match(r"error\[(command.usage|option.[a-z-]+)\]: ", error)
    assert hint.startswith("hint: ")


def test_python_m_runs_the_same(tiny_bundle: Path, pictures: list[str]) -> None:
    done = in_subprocess("caption", pictures[0], "-m", tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout == captions(tiny_bundle, pictures[:1])[0] + "\n"
    assert done.stderr == ""
    failed = in_subprocess("caption", "nowhere.png", "-m", tiny_bundle)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[0] == "error[image.not-found]: nowhere.png: no such file"


def test_help_and_version_import_nothing_large() -> None:
    large = (
        "onnxruntime",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "torch",
        "transformers",
        "numpy",
        "PIL",
    )
    code = (
        "import sys\n"
        "from vlmport.cli import app\n"
        "for arguments in (['--help'], ['--version'], ['caption', '--help']):\n"
        "    app(arguments, standalone_mode=False)\n"
        f"    print([name for name in {large} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines().count("[]") == 3


SLOW_EXPORT = """
import sys, time
from vlmport import cli
from vlmport.exporter import exporter
write = exporter.write_model
def slowly(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(30)
exporter.write_model = slowly
cli.main()
"""


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("SIGINT", 130, "interrupted"),
        ("SIGTERM", 143, "terminated"),
        ("SIGHUP", 129, "terminal closed"),
    ],
)
def test_a_signal_has_its_exit_code_and_leaves_nothing(
    name: str, code: int, word: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    out = tmp_path / "here/out"
    command = [sys.executable, "-c", SLOW_EXPORT, "export", tiny_checkpoint, out, "-p", "fp32"]
    with started(command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert list((tmp_path / "here").iterdir())  # the partial folder
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, f"{word}\n")
    assert list((tmp_path / "here").iterdir()) == []


STUCK = """
import sys
from vlmport import cli, signals
from vlmport.exporter import exporter
signals.PATIENCE = 0.5
def stuck(*arguments):
    import ctypes
    print("stuck", flush=True)
    lock = (ctypes.c_char * 64)()  # a mutex; no signal interrupts who waits for it
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(lock)
exporter.write_model = stuck
cli.main()
"""


def test_a_call_that_never_returns_is_ended(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, "export", tiny_checkpoint, tmp_path / "out"]
    with started(command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    code += "from vlmport import signals; signals.end_at_once();"
    code += "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN);"
    code += "print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_signal_while_modules_are_imported(tmp_path: Path) -> None:
    """Typer is slow to come; Ctrl-C does not wait for it, and prints no traceback."""
    (tmp_path / "typer.py").write_text(
        "import time; print('importing', flush=True); time.sleep(120)", encoding="utf-8"
    )
    command = [sys.executable, "-m", "vlmport", "models"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with started(command, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_a_closed_pipe_is_no_traceback(tiny_bundle: Path, pictures: list[str]) -> None:
    command = [sys.executable, "-m", "vlmport", "caption", *pictures, "-m", tiny_bundle]
    with started(command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(timeout=60), errors) == (1, "")
