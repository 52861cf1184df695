"""Serve the page on this machine, for this machine.

Gradio's own `launch` calls itself over the network, and can open a tunnel: here uvicorn serves what
Gradio builds. A browser gets a policy with each answer that lets the page load nothing from other
hosts.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from vlmport.app.answering import Answering
from vlmport.app.page import STYLE, build, draw_examples, load_gradio, theme
from vlmport.errors import OptionError

__all__ = ["AppServer", "open_server"]

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
MAX_FILE = 20_000_000  # bytes of an upload
LAST_SECONDS = 1  # streams of events never end by themselves
# Gradio's page has inline scripts, and compiles none.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob: data:",
        "font-src 'self' data:",
        "connect-src 'self' blob: data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AppServer:
    """A page that is ready to be served.

    Attributes:
        url: its address.
    """

    def __init__(self, app: Any, listening: socket.socket):
        self._app, self._socket = app, listening
        self.url = f"http://{HOST}:{listening.getsockname()[1]}/"

    def serve_forever(self) -> None:
        """Serve until the process is asked to end."""
        uvicorn: Any = importlib.import_module("uvicorn")
        config = uvicorn.Config(
            self._app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[self._socket])


@contextlib.contextmanager
def open_server(answering: Answering, port: int) -> Iterator[AppServer]:
    """Build the page and bind a port; uploads are deleted at the end.

    Args:
        answering: what answers.
        port: the port on 127.0.0.1; 0 takes a free one.

    Raises OptionError for a port that is in use, DependencyError where Gradio is not installed.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlmport-app-")))
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
        os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))  # where it is installed
        gradio = load_gradio()
        fastapi: Any = importlib.import_module("fastapi")
        blocks = build(answering, draw_examples(folder))
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            blocks,
            path="/",
            server_name=HOST,
            footer_links=[],
            max_file_size=MAX_FILE,
            ssr_mode=False,
            enable_monitoring=False,
            theme=theme(),
            css=STYLE,
        )
        yield AppServer(_Guard(app), stack.enter_context(_bound(port)))


def _bound(port: int) -> socket.socket:
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()  # until then another program could take the port too
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        raise OptionError(
            f"port {port}: {'another program uses it' if taken else error}",
            hint="--port 0 takes a free one",
            code="demo.port-unavailable",
        ) from error
    return listening


class _Guard:
    """Adds HEADERS to each answer, and refuses requests that name another host.

    Another site's name may resolve to this machine (DNS rebinding).
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        host = dict(scope["headers"]).get(b"host", HOST.encode()).decode("latin-1")
        if host.partition(":")[0] in HOSTS:
            await self._app(scope, receive, send_with_headers)
            return
        body = b"this server answers this machine only\n"
        start = {"type": "http.response.start", "status": 403, "headers": []}
        await send_with_headers(start)
        await send({"type": "http.response.body", "body": body})
