"""A server that runs in a thread, and the unmodified `openai` client for it."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from vlmport.serve.log import Log
from vlmport.serve.models import Load
from vlmport.serve.server import Server
from vlmport.serve.settings import Settings


@dataclass
class Running:
    """A server that answers, and what it logged."""

    server: Server
    url: str
    log: io.StringIO
    key: str
    clients: list[openai.OpenAI] = field(default_factory=list)

    def openai(self, **options: Any) -> openai.OpenAI:
        """A client, closed with the server: its open connections would be warned of."""
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, **options
        )
        self.clients.append(client)
        return client

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


@contextlib.contextmanager
def running(
    models: Mapping[str, str] | None = None, *, load: Load | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve on a free port of the loopback address while the block runs."""
    log = io.StringIO()
    given = Settings(port=0, grace=0, threads=1, **settings)
    models = models or {"shapes-smolvlm": "shapes-smolvlm"}
    server = Server(models, given, log=Log(as_json=True, stream=log), load=load)
    thread = threading.Thread(target=server.serve_until_asked, name="server")
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        one = Running(server, server.url, log, next(iter(given.api_keys), "none"))
        yield one
        for client in one.clients:
            client.close()
    finally:
        server.drain()
        thread.join(30)
        assert not thread.is_alive()
