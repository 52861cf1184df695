"""The server behind `vlmport demo`, with a page of its own instead of the built one."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.errors import raises
from tests.processes import started
from vlmport import demo
from vlmport.bundle import Bundle
from vlmport.errors import DependencyError, OptionError

WASM = bytes(range(256)) * 40


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "web_page"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<title>page</title>")
    (folder / "assets/ort.wasm").write_bytes(WASM)
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(demo, "page_folder", lambda: folder)
    return folder


@pytest.fixture
def server(page: Path, tiny_bundle: Path) -> Iterator[demo.DemoServer]:
    server = demo.make_server(Bundle.open(tiny_bundle), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.close()


def ask(
    server: demo.DemoServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, told, answer.read()
    finally:
        connection.close()


def test_the_page_is_isolated(server: demo.DemoServer) -> None:
    status, headers, body = ask(server, "/?precision=fp32")
    assert (status, body) == (200, b"<title>page</title>")
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-embedder-policy"] == "require-corp"
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache"


def test_assets_have_their_type_and_are_kept(server: demo.DemoServer) -> None:
    status, headers, body = ask(server, "/assets/ort.wasm")
    assert (status, body) == (200, WASM)
    assert headers["content-type"] == "application/wasm"
    assert "immutable" in headers["cache-control"]


def test_nothing_else_is_kept(server: demo.DemoServer) -> None:
    """Not even under an address that looks like an asset's."""
    for path in ("/", "/bundle/vlmport.json", "/bundle/vlmport.json?/assets/"):
        assert ask(server, path)[1]["cache-control"] == "no-cache", path


def test_every_file_of_the_bundle_and_no_other(
    server: demo.DemoServer, tiny_bundle: Path, tmp_path: Path
) -> None:
    for name in ["vlmport.json", *server.files.bundle.manifest.files]:
        assert ask(server, f"/bundle/{name}")[2] == (tiny_bundle / name).read_bytes()
    for path in (
        "/bundle/nothing",
        "/bundle/../secret.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/assets",
        "/bundle/",
        "/a%00b",
        "/" + "a" * 300,
        f"//{tmp_path}/secret.txt",
    ):
        assert ask(server, path)[0] == 404, path


def test_byte_ranges(server: demo.DemoServer) -> None:
    status, headers, body = ask(server, "/assets/ort.wasm", Range="bytes=100-199")
    assert (status, body) == (206, WASM[100:200])
    assert headers["content-range"] == f"bytes 100-199/{len(WASM)}"
    assert ask(server, "/assets/ort.wasm", Range=f"bytes={len(WASM)}-")[0] == 416


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, (0, 10)),
        ("bytes=0-", (0, 10)),
        ("bytes=3-5", (3, 6)),
        ("bytes=3-99", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=9-", (9, 10)),
        ("bytes=10-", None),
        ("bytes=-0", None),
        ("bytes=5-3", (0, 10)),
        ("bytes=1-2,4-5", (0, 10)),
        ("bytes=-", (0, 10)),
        (f"bytes=0-{'9' * 5000}", (0, 10)),
        (f"bytes={'9' * 5000}-", None),
        (f"bytes=-{'9' * 5000}", (0, 10)),
        (f"bytes={'0' * 5000}3-{'0' * 5000}5", (3, 6)),
        ("bytes=00-", (0, 10)),
        ("bytes=" + ",".join(f"{i}-" for i in range(9)), (0, 10)),
        ("lines=1-2", (0, 10)),
    ],
)
def test_parse_range(header: str | None, span: tuple[int, int] | None) -> None:
    assert demo.parse_range(header, 10) == span


def test_every_answer_has_its_policy(server: demo.DemoServer) -> None:
    """The worker's rules come with its own file, errors are pages too."""
    for path in ("/", "/assets/ort.wasm", "/bundle/vlmport.json", "/none"):
        headers = ask(server, path)[1]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_links_out_of_the_bundle_are_not_followed(page: Path, own_bundle_folder: Path) -> None:
    """One into the blobs of the Hub's cache is, as the cache has them."""
    bundle = Bundle.open(own_bundle_folder)
    cache = page.parent / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (cache / "blobs").mkdir()
    own_bundle_folder.rename(snapshot)
    names = ("config.json", "tokenizer.json", "generation_config.json")
    (snapshot / names[0]).rename(cache / "blobs" / "0")
    (snapshot / names[0]).symlink_to("../../blobs/0")
    (snapshot / names[1]).unlink()
    (snapshot / names[1]).symlink_to(page.parent / "secret.txt")
    (snapshot / names[2]).unlink()
    (snapshot / names[2]).symlink_to(names[2])
    with demo.DemoServer(page, Bundle(snapshot, bundle.manifest)) as server:
        found = [server.files.find(f"/bundle/{name}") for name in names]
        assert found == [snapshot / names[0], None, None]
        (page / "link").symlink_to(page.parent / "secret.txt")
        assert server.files.find("/link") is None


def test_half_a_request_keeps_no_place(
    server: demo.DemoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asks for nothing, or byte by byte, is closed; past a number nothing is taken."""
    monkeypatch.setattr(demo, "REQUEST_SECONDS", 0.5)
    address = demo.HOST, server.server_address[1]
    silent = [socket.create_connection(address, timeout=30) for _ in range(demo.CONNECTIONS)]
    for one in silent[:5]:
        one.sendall(b"GET / HTTP/1.1\r\nX")
    with socket.create_connection(address, timeout=30) as late:
        assert late.recv(1) == b""  # no place: closed at once
    assert [one.recv(1) for one in silent] == [b""] * len(silent)
    for one in silent:
        one.close()
    deadline = time.monotonic() + 30
    while server.places_taken and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(server, "/")[0] == 200


def test_head_has_no_body(server: demo.DemoServer) -> None:
    status, headers, body = ask(server, "/assets/ort.wasm", "HEAD")
    assert (status, headers["content-length"], body) == (200, str(len(WASM)), b"")


def test_another_sites_name_is_refused(server: demo.DemoServer) -> None:
    assert ask(server, "/", Host="evil.example")[0] == 403
    assert ask(server, "/", Host=f"localhost:{server.server_address[1]}")[0] == 200


def test_a_port_that_is_taken(server: demo.DemoServer) -> None:
    port = server.server_address[1]
    with pytest.raises(OptionError, match=f"port {port}: another program") as caught:
        demo.make_server(server.files.bundle, port)
    assert caught.value.code == "demo.port-unavailable"
    with pytest.raises(OptionError, match="port 99999"):
        demo.make_server(server.files.bundle, 99999)


def test_a_page_that_is_not_built(page: Path, tiny_bundle: Path) -> None:
    (page / "index.html").unlink()
    with raises(DependencyError, "demo.page-not-built") as error:
        demo.make_server(Bundle.open(tiny_bundle), 0)
    assert "npm run build" in str(error.value.hint)


# The command: in a process of its own, with the tests' page.
COMMAND = """
import sys
from pathlib import Path
from vlmport import cli, demo
page = Path(sys.argv.pop(1))
demo.page_folder = lambda: page
cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_command_prints_its_address_and_serves_until_interrupted(
    page: Path, tiny_bundle: Path
) -> None:
    command = [sys.executable, "-c", COMMAND, page, "demo", "--model", tiny_bundle, "--port", "0"]
    # The address has to come at once, whatever Python is told of buffers.
    with started(command, env=os.environ | {"PYTHONUNBUFFERED": ""}) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)  # else a silent one is waited for for ever
        watchdog.start()
        try:
            address = urlsplit(process.stdout.readline().strip())
            assert (address.scheme, address.hostname, address.path) == ("http", "127.0.0.1", "/")
            connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=60)
            connection.request("GET", "/")
            answer = connection.getresponse()
            assert answer.read() == b"<title>page</title>"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            whole = (tiny_bundle / "vlmport.json").read_bytes()
            connection.request("GET", "/bundle/vlmport.json", headers={"Range": "bytes=2-9"})
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (206, whole[2:10])
            connection.close()
        finally:
            process.send_signal(signal.SIGINT)  # Ctrl-C
            rest, said = process.communicate()
            watchdog.cancel()
    assert (process.returncode, rest) == (0, "")
    assert "Traceback" not in said


def test_the_command_without_a_built_page(page: Path, tiny_bundle: Path) -> None:
    (page / "index.html").unlink()
    command = [sys.executable, "-c", COMMAND, page, "demo", "--model", tiny_bundle]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "the page is not built" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
