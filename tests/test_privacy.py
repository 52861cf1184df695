"""Nothing is sent, and nothing is written outside the cache and what was asked for."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import no_network
from tests.web.test_demo import COMMAND as DEMO

ROOT = Path(__file__).parents[1]
PROGRAM = Path(no_network.__file__)
CALL = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
needs_filter = pytest.mark.skipif(not no_network.CAN_FORBID, reason="Linux's filter is used here")


def command_of(reach: str, *arguments: object) -> list[str]:
    """A Python program, without the network where the system can forbid it."""
    filtered = [sys.executable, str(PROGRAM), reach] if no_network.CAN_FORBID else []
    return [*filtered, sys.executable, *map(str, arguments)]


def empty_home(folder: Path) -> dict[str, str]:
    """An environment whose home is an empty folder, and in which nobody has chosen anything."""
    kept = {"PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "TMPDIR", "TEMP"}
    home = str(folder)
    return {
        **{name: value for name, value in os.environ.items() if name in kept},
        **dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA", "APPDATA"), home),
    }


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@needs_filter
@pytest.mark.parametrize("reach", ["nothing", "loopback"])
def test_the_filter_bites(reach: str) -> None:
    done = subprocess.run(command_of(reach, "-c", CALL), capture_output=True, check=False)
    assert done.returncode == -signal.SIGSYS


def test_commands_send_nothing_and_write_to_the_cache_alone(
    tmp_path: Path, tiny_checkpoint: Path, picture: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    model = ["--model", tiny_checkpoint, "--precision", "fp32"]
    commands = [
        ["caption", picture, *model],  # exports into the cache
        ["chat", "--image", picture, *model],
        ["models"],
        ["export", tiny_checkpoint, out, "--precision", "fp32"],
        ["inspect", out, "--probe"],
    ]
    program = (
        "import sys, vlmport.cli\n"
        f"for one in {[[str(part) for part in command] for command in commands]!r}:\n"
        "    sys.argv = ['vlmport', *one]\n"
        "    try: vlmport.cli.main()\n"
        "    except SystemExit as end: print('exit', one[0], end.code, file=sys.stderr)\n"
    )
    done = subprocess.run(
        command_of("nothing", "-c", program),
        env=empty_home(home),
        cwd=tmp_path,
        input="",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("exit ")]
    assert ends == [[command[0], "0"] for command in commands], done.stderr
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files, "what was exported on the way"
    assert [path for path in files if "vlmport" not in path.parts[len(home.parts) :]] == []
    assert {path.name for path in tmp_path.iterdir()} == {"home", "out", picture.name}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_demo_calls_nobody(tmp_path: Path, tiny_bundle: Path) -> None:
    home, page = tmp_path / "home", tmp_path / "page"
    home.mkdir(), page.mkdir()
    (page / "index.html").write_text("<title>page</title>")
    arguments = ("-c", DEMO, page, "demo", "--model", tiny_bundle, "--port", "0")
    with subprocess.Popen(
        command_of("loopback", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=empty_home(home),
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            address = process.stdout.readline().strip()
            assert urlsplit(address).hostname == "127.0.0.1"
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert answer.read() == b"<title>page</title>"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            watchdog.cancel()
    assert process.returncode == 0
    assert files_below(home) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_server_calls_nobody(tmp_path: Path, tiny_bundle: Path, picture: Path) -> None:
    """It answers, and refuses to fetch; the engine's thread opens no socket either."""
    home = tmp_path / "home"
    home.mkdir()
    arguments = ("-m", "vlmport", "serve", f"tiny={tiny_bundle}", "--port", "0")
    said = tmp_path / "stderr"
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            command_of("loopback", *arguments),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=empty_home(home),
        ) as process,
    ):
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            address = process.stdout.readline().strip()
            assert urlsplit(address).hostname == "127.0.0.1", said.read_text()
            assert "caption" in json.loads(posted(address, picture.read_bytes(), "image/png"))
            asked = json.dumps({"image": "https://example.com/a.png"}).encode()
            with pytest.raises(urllib.error.HTTPError) as refused:
                posted(address, asked, "application/json")
            with refused.value as answer:
                assert json.load(answer)["error"]["code"] == "image.url-not-allowed"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            watchdog.cancel()
    assert process.returncode == 0, said.read_text()
    assert files_below(home) == []


def posted(address: str, body: bytes, kind: str) -> bytes:
    """What the server answers to a body at /caption."""
    request = urllib.request.Request(f"{address}/caption", body, {"content-type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@pytest.mark.parametrize("chosen", ["0", "1"])
def test_a_users_choice_is_kept(chosen: str) -> None:
    code = "import os, vlmport; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": chosen}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == chosen


def test_programs_of_this_repository_say_so_before_they_import_onnx_runtime() -> None:
    """Tests are imported after their conftest.py."""
    programs = [ROOT / "tests/conftest.py"]
    for folder in ("benchmarks", "examples", "training"):
        programs += (ROOT / folder).rglob("*.py")
    late = [path for path in programs if "node_modules" not in path.parts and imports_late(path)]
    assert [path.relative_to(ROOT).as_posix() for path in late] == []


def imports_late(path: Path) -> bool:
    """Whether a program imports ONNX Runtime before anything has switched its reports off."""
    for node in ast.parse(path.read_text("utf-8")).body:
        text = ast.unparse(node)
        if "ORT_DISABLE_TELEMETRY" in text or text.startswith(("import vlmport", "from vlmport")):
            return False
        if text.startswith(("import onnxruntime", "from onnxruntime")):
            return True
    return False
