"""`vlmport demo`: serve the browser page and a bundle on this machine, for this machine.

Traps:
- WebAssembly threads need a cross-origin isolated page: every answer carries COOP and COEP.
- A broken download is resumed by byte range, which `http.server` does not know.
- Another site could reach a server on 127.0.0.1 under a name of its own that points here: a
  request that names another host is refused.
"""

from __future__ import annotations

import errno
import mimetypes
import re
import socketserver
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vlmport.bundle import MANIFEST, Bundle
from vlmport.errors import DependencyError, OptionError
from vlmport.layouts import HUB

HOST = "127.0.0.1"
BLOCK_BYTES = 1024 * 1024
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Accept-Ranges": "bytes",
}
TYPES = {".js": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
FOREVER = "public, max-age=31536000, immutable"


def make_server(bundle: Bundle, port: int) -> DemoServer:
    """A server that listens but does not answer yet; port 0 takes any free one.

    Raises OptionError for a port that is taken, DependencyError for a page that was not built.
    """
    bundle.needs_layout(HUB)
    page = page_folder()
    if not (page / "index.html").is_file():
        raise DependencyError(
            f"{page}: the page is not built",
            hint="in a checkout: cd web && npm ci --ignore-scripts && npm run build",
        )
    try:
        return DemoServer(page, bundle, port)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise OptionError(
            f"port {port}: {'another program listens there' if taken else error}",
            hint="--port 0 takes any free one",
        ) from error


def page_folder() -> Path:
    """Where the built page lies in this package."""
    return Path(str(resources.files("vlmport") / "web_page"))


class DemoServer(ThreadingHTTPServer):
    """The page at /, the bundle's files at /bundle/."""

    daemon_threads = True

    def __init__(self, page: Path, bundle: Bundle, port: int = 0):
        super().__init__((HOST, port), _Handler)
        self.page = page
        self.bundle = bundle
        self._listed = {MANIFEST, *bundle.manifest.files}

    def server_bind(self) -> None:
        """Bind; http.server would also ask the network for the name of this address."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def close(self) -> None:
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def find(self, path: str) -> Path | None:
        """The file behind a path; None where there is none, or none that is to be seen."""
        if path.startswith("/bundle/"):
            name = path.removeprefix("/bundle/")
            file = self.bundle.path(name)
            return file if name in self._listed and file.is_file() else None
        try:
            file = (self.page / (path.lstrip("/") or "index.html")).resolve()
            inside = file.is_relative_to(self.page.resolve())
            return file if inside and file.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that closes a connection is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DemoServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.FORBIDDEN, "this server is for this machine")
        elif (file := self.server.find(unquote(urlsplit(self.path).path))) is None:
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

    def _send(self, file: Path, start: int, stop: int, *, with_body: bool) -> None:
        size = file.stat().st_size
        partial = (start, stop) != (0, size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Type", content_type(file))
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
        """Nothing: the page itself says what it does."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; the whole file without one, None where none of it exists.

    Several ranges at once, and what is no range at all, are ignored, as RFC 9110 allows.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if match is None or match.group(0) == "bytes=-":
        return 0, size
    first, last = match.groups()
    if not first:
        count = min(int(last), size)
        return (size - count, size) if count else None
    start, stop = int(first), min(int(last) + 1 if last else size, size)
    if last and int(last) < start:
        return 0, size
    return (start, stop) if start < size else None


def content_type(file: Path) -> str:
    """By the file's name; the system's table may lack WebAssembly or know a wrong type."""
    if file.suffix in TYPES:
        return TYPES[file.suffix]
    kind, _ = mimetypes.guess_type(file.name)
    kind = kind or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


def _blocks(file: Path, start: int, stop: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        opened.seek(start)
        while start < stop and (block := opened.read(min(BLOCK_BYTES, stop - start))):
            start += len(block)
            yield block
