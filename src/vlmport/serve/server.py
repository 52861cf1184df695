"""Run the app: bind the port, serve, and drain when the process is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Generator, Mapping
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus

from vlmport import signals
from vlmport.errors import OptionError
from vlmport.serve.app import create_app
from vlmport.serve.log import LibraryHandler, Log
from vlmport.serve.models import Load
from vlmport.serve.settings import Settings

LAST_SECONDS = 5.0  # for connections to send what is left, after the models were closed
KEEP_ALIVE_SECONDS = 15
HEAD_SECONDS = 15.0  # for the head of a connection's first request


class Server(uvicorn.Server):
    """A server that drains before it ends: running requests go on for `grace` seconds.

    While it drains it answers others with 503.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        settings: Settings,
        *,
        log: Log | None = None,
        load: Load | None = None,
    ):
        """Bind the port. Raises OptionError where that is not possible."""
        self.log = log or Log()
        self.app = create_app(sources, settings, log=self.log, load=load)
        self.settings = settings
        self.socket = bind(settings.host, settings.port)
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(LAST_SECONDS),
            ws="none",
            lifespan="on",
        )
        super().__init__(config)
        self._silent: dict[Any, float] = {}  # connection → since when a request's head is due
        self._closing: dict[Any, float] = {}  # connection → since when it is being closed
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """The address of the server."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def serve_until_asked(self) -> None:
        """Serve until a signal, or a call of `drain`.

        Raises what `vlmport.load` raises where models are opened at the start.
        """
        AppStatus.disable_automatic_graceful_drain()  # streams end with their jobs, not before
        try:
            with _logged_by(self.log):
                asyncio.run(self._run())
        finally:
            self.socket.close()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._log_defect)
        with signals.calling(self.drain):
            if self.settings.preload:
                await self.app.state.service.models.preload()
            await self.serve(sockets=[self.socket])

    def _log_defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error that no task has handled; asyncio itself prints a traceback."""
        error = context.get("exception")
        if isinstance(error, BaseException):
            self.log.defect("", error)
        else:
            self.log.event("asyncio", text=str(context.get("message"))[:300])

    def drain(self, number: int | None = None) -> None:
        """Take no more requests, and end when the running ones have; from any thread.

        A second call ends them at once.
        """
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is None:
            self.log.event("draining", grace=self.settings.grace)
            self._draining = asyncio.get_running_loop().create_task(self._end())
        else:
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        await self.app.state.service.models.close(self.settings.grace)
        await asyncio.sleep(0.1)  # the last events of streams go out
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Close connections that don't send the head of a request, or don't read; called ten times
        a second. Uvicorn itself waits for both forever."""
        if counter % 10 == 0:
            now, silent, closing = time.monotonic(), {}, {}
            for connection in self.server_state.connections:
                if (transport := connection.transport) is None:
                    continue
                if transport.is_closing():
                    closing[connection] = self._closing.get(connection, now)
                elif _owes_a_head(connection):
                    silent[connection] = self._silent.get(connection, now)
            for connection, since in silent.items():
                if now - since > HEAD_SECONDS:
                    connection.transport.close()
            for connection, since in closing.items():
                if now - since > LAST_SECONDS:  # what is left to send is not read
                    connection.transport.abort()
            self._silent, self._closing = silent, closing
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to `signals.calling`."""
        yield


@contextlib.contextmanager
def _logged_by(log: Log) -> Generator[None, None, None]:
    """Pass on what uvicorn and asyncio log; on stderr it would be no JSON, and have tracebacks."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "asyncio")]
    before = [one.propagate for one in loggers]
    handlers = [LibraryHandler(log, one.name) for one in loggers]
    for logger, handler in zip(loggers, handlers, strict=True):
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, handler, propagates in zip(loggers, handlers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagates


def _owes_a_head(connection: Any) -> bool:
    """Whether a connection has begun to send a request, or has sent none since it was opened."""
    cycle = getattr(connection, "cycle", None)
    return cycle is None or (
        cycle.response_complete and getattr(connection, "timeout_keep_alive_task", None) is None
    )


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket. Raises OptionError for an address that can't be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise _not_bound(host, port, getattr(error, "strerror", None) or str(error)) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except (OSError, OverflowError) as error:
        made.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "another program uses it" if taken else getattr(error, "strerror", None) or str(error)
        raise _not_bound(host, port, why) from error
    return made


def _not_bound(host: str, port: int, why: str) -> OptionError:
    return OptionError(
        f"can't listen on {host}, port {port}: {why}",
        hint="--port 0 takes a free one",
        code="server.port-unavailable",
    )
