"""`vlmport serve` as a process, and its settings."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.errors import raises
from tests.serve.conftest import RED_SQUARE
from tests.serve.test_limits import LONG, waited_for
from vlmport import cli
from vlmport.errors import OptionError
from vlmport.serve.models import names_of
from vlmport.serve.settings import Settings, check_exposure, is_loopback, read_api_keys

COMMAND = [sys.executable, "-m", "vlmport", "serve", "--port", "0", "--threads", "1"]


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command, and give its address."""
    done = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert done.stdout is not None
        url = done.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), done.communicate(timeout=10)
        yield done, url
    finally:
        done.kill()
        done.communicate()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_it_serves_and_a_signal_ends_it() -> None:
    with process("shapes", "--log-json") as (done, url):
        assert waited_for(lambda: ready(url), 120)
        image = RED_SQUARE.read_bytes()
        answer = httpx.post(f"{url}/caption", content=image, timeout=60).json()
        assert answer == {"caption": "a red square on a white background"}
        done.send_signal(signal.SIGTERM)
        _, errors = done.communicate(timeout=60)
    assert done.returncode == 0
    first, *lines = errors.splitlines()
    assert "this machine only" in first
    events = [json.loads(line) for line in lines]
    assert any(one.get("path") == "/caption" and one["model"] == "shapes" for one in events)
    assert "Traceback" not in errors


def test_running_requests_end_before_the_server() -> None:
    question = {"model": "shapes-smolvlm", "messages": [{"role": "user", "content": "What is it?"}]}
    with process("shapes-smolvlm", "--preload") as (done, url):
        assert waited_for(lambda: ready(url), 120)
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {**question, **LONG}
            answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        running = 'vlmport_running{model="shapes-smolvlm"} 1.0'
        assert waited_for(lambda: running in httpx.get(f"{url}/metrics").text)
        done.send_signal(signal.SIGINT)
        thread.join()
        done.communicate(timeout=60)
        assert done.returncode == 0
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400


def test_it_does_not_start_where_it_must_not(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("short\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, code in (
            (["--host", "0.0.0.0"], "server.open-without-key"),
            (["--api-key-file", str(keys)], "server.bad-key-file"),
            (["--api-key-file", str(tmp_path / "none")], "server.bad-key-file"),
            (["--port", port], "server.port-unavailable"),
            (["--host", "host.invalid", "--no-auth"], "server.port-unavailable"),
            (["--allow-images-from", "a/b"], "option.wrong-value"),
            (["shape"], "source.not-found"),
            (["./none"], "source.not-found"),
            (["a=shapes", "a=shapes-smolvlm"], "server.same-name"),
        ):
            done = CliRunner().invoke(cli.app, ["serve", *arguments], catch_exceptions=False)
            assert done.exit_code == 2, done.stderr
            assert done.stderr.startswith(f"error[{code}]: "), done.stderr
            assert done.stdout == ""


def test_a_model_that_can_not_be_opened_at_the_start_ends_it(tmp_path: Path) -> None:
    with process(str(tmp_path), "--preload") as (done, _):
        _, errors = done.communicate(timeout=60)
    assert done.returncode == 2
    assert "error[" in errors
    assert "hint: " in errors
    assert "Traceback" not in errors


def test_keys_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of Ann\nann-secret-1\n\n  bob-secret-2  \n")
    assert read_api_keys(path) == ("ann-secret-1", "bob-secret-2")
    for text in ("", "# none\n", "short\n", "clé-secrète-1\n", "two words\t1\n\x00"):
        path.write_text(text, encoding="utf-8")
        if text.startswith("two"):
            continue
        with raises(OptionError, "server.bad-key-file", str(path)):
            read_api_keys(path)
    path.write_bytes(b"\xff\xfe")
    with raises(OptionError, "server.bad-key-file", str(path)):
        read_api_keys(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)
    check_exposure(Settings(host=host), no_auth=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.5", "example.com", ""])
def test_other_addresses_need_a_key(host: str) -> None:
    with raises(OptionError, "server.open-without-key", host):
        check_exposure(Settings(host=host), no_auth=False)
    check_exposure(Settings(host=host), no_auth=True)
    check_exposure(Settings(host=host, api_keys=("a-secret-key",)), no_auth=False)


def test_names_of_hosts() -> None:
    local = Settings(allowed_hosts=("captions.lan",))
    for name in ("127.0.0.1", "localhost:8000", "[::1]:80", "captions.lan", "CAPTIONS.LAN:1"):
        assert local.knows_host(name), name
    for name in ("", "evil.example", "10.0.0.1", "localhost.evil.example", "127.0.0.1:x"):
        assert not local.knows_host(name), name
    open_to_all = Settings(host="0.0.0.0")
    assert open_to_all.knows_host("192.168.0.5:8000")
    assert not open_to_all.knows_host("rebound.example")
    assert Settings(host="0.0.0.0", api_keys=("a-secret-key",)).knows_host("any.example")


def test_names_of_models(tmp_path: Path) -> None:
    folder = tmp_path / "my-bundle"
    folder.mkdir()
    assert names_of(["shapes", str(folder), "org/name", "mine=org/other"]) == {
        "shapes": "shapes",
        "my-bundle": str(folder),
        "org/name": "org/name",
        "mine": "org/other",
    }
    for given in ("=shapes", "mine=", "="):
        with raises(OptionError, "option.wrong-value", repr(given), "NAME=SRC"):
            names_of([given])
    with raises(OptionError, "server.same-name", "shapes"):
        names_of(["shapes", "shapes"])
