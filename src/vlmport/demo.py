"""`vlmport demo`: serve the browser page and a bundle on this machine, for this machine.

Traps:
- WebAssembly threads need a cross-origin isolated page: every response carries COOP and COEP.
- A broken download is resumed by byte range, which `http.server` does not know.
- The page may load nothing from other hosts, and a worker gets its rules with its own file, not
  from the page: every response has the Content-Security-Policy, with `wasm-unsafe-eval`.
- A connection that sends half a request, or none, would keep its thread forever: each has a time
  limit for its request, and the number of connections is limited.
- In the Hub's cache a bundle's files are links to its folder of blobs. A link to any other place is
  not followed: a downloaded bundle could name the user's own files.
- Another site could reach a server on 127.0.0.1 by a name of its own that resolves to it (DNS
  rebinding): a request that names another host is refused.
"""

from __future__ import annotations

import contextlib
import errno
import mimetypes
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from vlmport.bundle import MANIFEST, Bundle
from vlmport.bundle.layouts import HUB
from vlmport.errors import DependencyError, OptionError

HOST = "127.0.0.1"
BLOCK_BYTES = 1024 * 1024
CONNECTIONS = 64
REQUEST_SECONDS = 15.0  # limit for the head of a request, and between two requests
STALLED_SECONDS = 60.0  # limit for one write while the browser reads nothing
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "worker-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self' blob: data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Accept-Ranges": "bytes",
}
TYPES = {".js": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
FOREVER = "public, max-age=31536000, immutable"


def make_server(bundle: Bundle, port: int) -> DemoServer:
    """Make a server that listens on a port; `serve_forever` makes it answer.

    Args:
        bundle: the bundle that the page runs.
        port: the port on 127.0.0.1; 0 takes a free one.

    Raises OptionError for a port that is in use, DependencyError where the page was not built.
    """
    bundle.needs_layout(HUB)
    page = page_folder()
    if not (page / "index.html").is_file():
        raise DependencyError(
            f"{page}: the page is not built",
            hint="in a clone of the repository, build it with Node.js 20 or newer: "
            "cd web && npm ci --ignore-scripts && npm run build",
            code="demo.page-not-built",
        )
    try:
        return DemoServer(page, bundle, port)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise OptionError(
            f"port {port}: {'another program uses it' if taken else error}",
            hint="--port 0 takes a free one",
            code="demo.port-unavailable",
        ) from error


def page_folder() -> Path:
    """The folder of the built page in this package."""
    return Path(str(resources.files("vlmport") / "web_page"))


class DemoServer(ThreadingHTTPServer):
    """A server of the page at /, and of the bundle's files at /bundle/."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, page: Path, bundle: Bundle, port: int = 0):
        super().__init__((HOST, port), _Handler)
        self.files = PageFiles(page, bundle)
        self._taken, self._lock = 0, threading.Lock()
        self.waiting: dict[socket.socket, float] = {}  # connection → time limit of its request

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread; close the connection where CONNECTIONS of them run."""
        with self._lock:
            free = self._taken < CONNECTIONS
            self._taken += free
        if free:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.waiting.pop(request, None)
            with self._lock:
                self._taken -= 1

    def service_actions(self) -> None:
        """Close connections that sent no request in time; called twice a second."""
        now = time.monotonic()
        for connection, until in list(self.waiting.items()):
            if until < now:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # its thread reads the end

    def server_bind(self) -> None:
        """Bind, without the look-up of a host name that http.server makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    @property
    def places_taken(self) -> int:
        """Number of connections that have a thread now."""
        return self._taken

    def close(self) -> None:
        """Stop to listen."""
        self.server_close()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: a browser that closes a connection is no error."""


class PageFiles:
    """The files that may be served: the page's, and below /bundle/ those of a bundle."""

    def __init__(self, page: Path, bundle: Bundle | None):
        self.page, self.bundle = page, bundle
        self._listed = set() if bundle is None else {MANIFEST, *bundle.manifest.files}
        self._homes = [] if bundle is None else _homes(bundle.folder)

    def find(self, path: str) -> Path | None:
        """Find the file for a path; None where there is none, or none that may be served."""
        if path.startswith("/bundle/"):
            name = path.removeprefix("/bundle/")
            if self.bundle is None or name not in self._listed:
                return None
            return _inside(self.bundle.path(name), self._homes)
        return _inside(self.page / (path.lstrip("/") or "index.html"), [self.page.resolve()])


def _homes(folder: Path) -> list[Path]:
    """The folders that may hold a bundle's files: its own, and the blobs of the Hub's cache."""
    real = folder.resolve()
    blobs = real.parent.parent / "blobs"
    return [real, blobs] if real.parent.name == "snapshots" else [real]


def _inside(path: Path, homes: list[Path]) -> Path | None:
    """Return the path; None where there is no file, or where a link leads out of the folders."""
    try:
        file = path.resolve()
        inside = any(file.is_relative_to(home) for home in homes)
        return path if inside and file.is_file() else None
    except (OSError, RuntimeError, ValueError):  # a name that no file can have; a loop of links
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = STALLED_SECONDS
    server: DemoServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle_one_request(self) -> None:
        self.server.waiting[self.connection] = time.monotonic() + REQUEST_SECONDS
        super().handle_one_request()

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        self.server.waiting.pop(self.connection, None)
        return parsed

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.FORBIDDEN, "this server answers this machine only")
        elif (file := self.server.files.find(unquote(urlsplit(self.path).path))) is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif (span := parse_range(self.headers.get("Range"), file.stat().st_size)) is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{file.stat().st_size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(file, *span, with_body=with_body)

    def _is_for_us(self) -> bool:
        host = self.headers.get("Host", HOST)
        return host.partition(":")[0] in (HOST, "localhost")

    def _send(self, path: Path, start: int, stop: int, *, with_body: bool) -> None:
        try:
            file = path.open("rb")
        except OSError:  # not readable
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            self._send_open(path, file, start, stop, with_body=with_body)

    def _send_open(
        self, path: Path, file: BinaryIO, start: int, stop: int, *, with_body: bool
    ) -> None:
        size = path.stat().st_size
        partial = (start, stop) != (0, size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Type", content_type(path))
        self.send_header(
            "Cache-Control", FOREVER if self.path.startswith("/assets/") else "no-cache"
        )
        self.end_headers()
        if with_body:
            for block in _blocks(file, start, stop):
                self.wfile.write(block)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the page shows what it does."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Read (start, stop) from a Range header; None where no byte of the range exists.

    Without a header it is the whole file. So it is for several ranges, and for a header that is no
    range, as RFC 9110 allows.
    """
    match = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", (header or "").strip())
    if match is None or match.group(0) == "bytes=-":
        return 0, size
    # More digits than any size has; Python refuses to read thousands of them.
    first, last = (digits.lstrip("0")[:20] or digits[:1] for digits in match.groups())
    if not first:
        count = min(int(last), size)
        return (size - count, size) if count else None
    start, stop = int(first), min(int(last) + 1 if last else size, size)
    if last and int(last) < start:
        return 0, size
    return (start, stop) if start < size else None


def content_type(file: Path) -> str:
    """Choose the type by the file's name; the system's table may lack or mistake WebAssembly."""
    if file.suffix in TYPES:
        return TYPES[file.suffix]
    kind, _ = mimetypes.guess_type(file.name)
    kind = kind or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


def _blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (block := file.read(min(BLOCK_BYTES, stop - start))):
        start += len(block)
        yield block
