"""What answers the page of `vlmport app`, with a server that only looks like one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.errors import raises
from vlmport.app.answering import RemoteAnswering
from vlmport.app.page import messages_of
from vlmport.errors import ServerError

PICTURE = Path(__file__).parents[2] / "examples/red_square.png"
QUESTION = "what color is the background?"
CHUNKS = ("a ", "", "red square")


class Served(ThreadingHTTPServer):
    """A server with OpenAI's API that answers from a table; `asked` are the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any, str | None]] = []
        models = {"data": [{"id": "shapes"}, {"id": "other"}]}
        facts = {"id": "shapes", "vlmport": {"precision": "q4", "device": "cpu", "more": 1}}
        self.answers: dict[str, tuple[int, Any]] = {
            "/v1/models": (200, models),
            "/v1/models/shapes": (200, facts),
            "/v1/models/other": (200, {"id": "other"}),
            "/caption?model=shapes&max_new_tokens=9": (200, {"caption": "a red square"}),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Served  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def answer(self, body: Any) -> None:
        self.server.asked.append((self.path, body, self.headers.get("authorization")))
        status, found = self.server.answers[self.path]
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def events(*chunks: Any) -> bytes:
    lines = [f"data: {json.dumps(one)}\n\n" for one in chunks]
    return "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()


def asking(question: str) -> list[dict[str, Any]]:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_a_server_answers(served: Served) -> None:
    there = RemoteAnswering(f"{served.url}/v1/", api_key="secret-key")
    assert (there.name, there.facts()) == (
        "shapes",
        ("precision q4", "device cpu", f"served by {served.url}"),
    )
    deltas = [{"choices": [{"delta": {"content": one}}]} for one in CHUNKS]
    role, usage = {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [], "usage": {}}
    served.answers["/v1/chat/completions"] = (200, events(role, *deltas, usage))
    messages = [
        *asking("first?"),
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
        {"role": "user", "content": [{"type": "text", "text": "second?"}]},
    ]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert "".join(there.answer(messages, [str(PICTURE)], **options)) == "a red square"
    path, body, key = served.asked[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret-key")
    url = body["messages"][0]["content"][0].pop("image_url")["url"]
    assert url.startswith("data:image/png;base64,iVBORw0KGgo")
    assert body == {
        "model": "shapes",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url"}, {"type": "text", "text": "first?"}],
            },
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "second?"}]},
        ],
        "stream": True,
        "max_tokens": 5,
        "temperature": 0,
    }
    assert list(there.caption(str(PICTURE), max_new_tokens=9)) == ["a red square"]
    assert served.asked[-1][1] == {"image": url}
    there.close()


def test_a_server_that_refuses(served: Served) -> None:
    there = RemoteAnswering(served.url, "other")
    assert there.facts() == (f"served by {served.url}",)
    error = {"error": {"message": "too many images", "code": "server.too-many-images"}}
    served.answers["/v1/chat/completions"] = (413, error)
    with raises(ServerError, "server.refused", 413, "too many images"):
        list(there.answer(asking(QUESTION), [str(PICTURE)]))
    first = {"choices": [{"delta": {"content": "a"}}]}
    served.answers["/v1/chat/completions"] = (200, events(first, error))
    pieces = there.answer(asking(QUESTION), [str(PICTURE)])
    assert next(pieces) == "a"
    with raises(ServerError, "server.refused", "too many images"):
        next(pieces)
    for status, body in ((500, b"<h1>a proxy</h1>"), (502, b"[1]"), (401, b'{"error": "no key"}')):
        served.answers["/caption?model=other&max_new_tokens=9"] = (status, body)
        with raises(ServerError, "server.refused", status):
            list(there.caption(str(PICTURE), max_new_tokens=9))
    served.answers["/v1/chat/completions"] = (200, b"data: {\n\n")
    with raises(ServerError, "server.unreachable", "JSON"):
        list(there.answer(asking(QUESTION), [str(PICTURE)]))
    there.close()


def test_a_server_that_is_none(served: Served) -> None:
    with raises(ServerError, "server.unknown-model", "'third'"):
        RemoteAnswering(served.url, "third")
    for found in ({"data": []}, b"<h1>page</h1>", [1]):
        served.answers["/v1/models"] = (200, found)
        with raises(ServerError, "server.unreachable", served.url):
            RemoteAnswering(served.url)
    for url in ("http://127.0.0.1:1", "nowhere", "ftp://127.0.0.1:1", "http://[::1"):
        with raises(ServerError, "server.unreachable", url):
            RemoteAnswering(url)


def test_a_history_becomes_messages() -> None:
    def text(one: str) -> dict[str, Any]:
        return {"type": "text", "text": one}

    files = [{"type": "file", "file": {"path": one}} for one in ("a.png", "b.png")]
    history = [
        {"role": "user", "content": [*files]},
        {"role": "user", "content": [text("which?")]},
        {"role": "assistant", "content": "the first"},
        {"role": "user", "content": [files[1], text("")]},
    ]
    messages, images = messages_of(history)
    assert images == ["a.png", "b.png", "b.png"]
    image = {"type": "image"}
    assert messages == [
        {"role": "user", "content": [image, image, text("which?")]},
        {"role": "assistant", "content": [text("the first")]},
        {"role": "user", "content": [image]},
    ]
