"""Middleware: who may ask, how much a body may hold, and what is logged and counted.

- `Watcher`, the outermost, gives each request an id, logs it, and turns every exception into an
  answer: Starlette's own handler would let the server print a traceback.
- `Guard` refuses requests by host, origin, key, size and slowness, before anything is parsed.

Both are plain ASGI, so that streams pass through them as they are.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmport.errors import VlmportError
from vlmport.runtime.scheduling import Job
from vlmport.serve.api_errors import RequestError, defect, response_of, status_of
from vlmport.serve.log import Log
from vlmport.serve.metrics import Metrics
from vlmport.serve.settings import Settings
from vlmport.serve.waiting import ClientGoneError

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = ("/health", "/ready")  # for those who watch the server; they tell nothing else
GONE = 499  # nginx's status for a client that left
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@dataclass
class _Exchange:
    """One request and its response, as far as they are known."""

    id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    received: int = 0
    sent: int = 0


class Watcher:
    """Gives requests an id, logs and counts them, and answers for exceptions."""

    def __init__(self, app: ASGIApp, log: Log, metrics: Metrics):
        self.app, self._log, self._metrics = app, log, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        exchange = _Exchange(given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8))
        scope.setdefault("state", {})["request_id"] = exchange.id

        async def counted() -> Message:
            message = await receive()
            exchange.received += len(message.get("body", b""))
            return message

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            exchange.sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted, named)
        except asyncio.CancelledError:
            exchange.status = exchange.status or GONE
            raise
        except (ClientGoneError, ClientDisconnect, SendTimeoutError):
            exchange.status = GONE
        except Exception as error:
            await self._answer_for(error, exchange, scope, receive, named)
        finally:
            self._done(scope, exchange)

    async def _answer_for(
        self, error: Exception, exchange: _Exchange, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer for an exception; where the answer has begun, only the log can tell of it."""
        known = error if isinstance(error, VlmportError) else defect(error)
        if known is not error:
            self._log.defect(exchange.id, error)
        if not exchange.status:
            await response_of(known)(scope, receive, send)
        else:
            exchange.status = status_of(known)

    def _done(self, scope: Scope, exchange: _Exchange) -> None:
        seconds = time.monotonic() - exchange.began
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        status = exchange.status or GONE
        self._metrics.request(path, status, seconds, exchange.received, exchange.sent)
        self._log.request(
            exchange.id,
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
            received=exchange.received,
            sent=exchange.sent,
            **scope["state"].get("logged", {}),
            **_tokens(scope["state"].get("job")),
        )


def _tokens(job: Job | None) -> dict[str, int]:
    """Count the tokens of a request's job, if it has one that made any."""
    ended = None if job is None else job.ended
    return {} if ended is None or ended.response is None else dict(ended.response.counts)


class Guard:
    """Refuses requests by host, origin, key, size and slowness."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RequestError as error:
            await response_of(error)(scope, receive, send)
            return
        await self.app(scope, self._limited(scope, receive), send)

    def _check(self, scope: Scope) -> None:
        headers, settings = Headers(scope=scope), self._settings
        if not settings.knows_host(headers.get("host", "")):
            raise RequestError(
                f"host {headers.get('host', '')[:80]!r} is not a name of this server",
                hint="--allowed-host NAME adds a name",
                code="server.wrong-host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._knows_origin(origin, headers.get("host", "")):
            raise RequestError(
                f"pages of {origin[:80]!r} may not call this server",
                hint="--cors-origin ORIGIN allows an origin",
                code="server.foreign-origin",
            )
        if settings.api_keys and scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not settings.knows_key(key.strip()):
                raise RequestError(
                    "a key is needed, and none was given"
                    if not key
                    else "the key is not one of this server's",
                    hint="send it as the header Authorization: Bearer KEY",
                    code="server.unauthorized",
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > settings.max_body_bytes:
            raise self._too_large()

    def _knows_origin(self, origin: str, host: str) -> bool:
        if origin in self._settings.cors_origins or "*" in self._settings.cors_origins:
            return True
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False

    def _too_large(self) -> RequestError:
        limit = self._settings.max_body_bytes
        return RequestError(
            f"the body has more than {limit:,} bytes",
            hint="send fewer or smaller images, or start the server with a larger --max-body-mb",
            code="server.body-too-large",
        )

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Limit the size of a body, and the time until all of it is there."""
        received, complete = 0, False
        until = time.monotonic() + self._settings.body_seconds

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise RequestError(
                    f"the body was not complete after {self._settings.body_seconds:g} seconds",
                    hint="send it faster, or start the server with a larger --body-seconds",
                    code="server.body-too-slow",
                ) from None
            received += len(message.get("body", b""))
            if received > self._settings.max_body_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        return limited
