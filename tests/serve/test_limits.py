"""Limits: bodies, images, queues, times, models; clients that leave; and the end of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

import vlmport
from tests.errors import raises
from tests.serve.conftest import RED_SQUARE
from tests.serve.running import Running, running
from tests.serve.test_chat import MODEL, question
from vlmport.errors import ImageError
from vlmport.runtime.scheduling import Job
from vlmport.serve import app as app_module
from vlmport.serve import server as server_module
from vlmport.serve.api_errors import RequestError
from vlmport.serve.chat_messages import read_images
from vlmport.serve.models import Models
from vlmport.serve.settings import Settings

HI = [{"role": "user", "content": "hi"}]
# An answer that goes on: the only token that ends it is made very unlikely.
LONG: dict[str, Any] = {"min_new_tokens": 400, "max_tokens": 400}


def waited_for(holds: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def scheduler(server: Running) -> Any:
    (model,) = server.server.app.state.service.models.open_models
    return model.scheduler


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_sizes(red_square: str) -> None:
    with (
        running(
            max_body_bytes=5000, max_images=2, max_image_bytes=400, max_characters=50
        ) as server,
        server.http() as client,
    ):

        def asked(messages: Any) -> tuple[int, str]:
            body = {"model": MODEL, "messages": messages}
            return error_of(client.post("/v1/chat/completions", json=body))

        too_large = (413, "server.body-too-large")
        assert asked([{"role": "user", "content": "a" * 6000}]) == too_large
        assert asked([{"role": "user", "content": "a" * 60}]) == (400, "server.text-too-long")
        images = question(red_square)[0]["content"][:1]
        assert asked([{"role": "user", "content": images * 3}]) == (400, "server.too-many-images")
        assert asked(question(red_square)) == (400, "server.image-too-large")

        def parts() -> Any:
            for _ in range(100):
                yield b" " * 100

        headers = {"content-type": "application/json"}  # and no content-length
        chunked = client.post("/v1/chat/completions", content=parts(), headers=headers)
        assert error_of(chunked) == too_large
        assert error_of(client.post("/caption", content=b"a" * 500)) == (
            400,
            "server.image-too-large",
        )


def test_a_slow_body_ends() -> None:
    with running(body_seconds=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
                "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
            )
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"server.body-too-slow" in answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127."])
def test_a_connection_without_a_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.5)
    with running() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""
        with server.http() as client:  # one that asked stays open between two requests
            client.get("/health")
            time.sleep(2.5)
            assert client.get("/health").status_code == 200


def test_a_second_request_without_its_end_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.5)
    with running() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.")
            while connection.recv(65536):
                pass


def test_a_client_that_stops_reading_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch, red_square: str
) -> None:
    monkeypatch.setattr(app_module, "SEND_SECONDS", 0.5)
    monkeypatch.setattr(server_module, "LAST_SECONDS", 1.0)
    many = {"n": 8, "temperature": 1, "logprobs": True, "top_logprobs": 20, **LONG}
    asked = {"model": MODEL, "messages": question(red_square), "stream": True, **many}
    body = json.dumps(asked).encode()
    with running() as server, socket.socket() as connection:
        host, port = server.url.removeprefix("http://").split(":")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert connection.recv(100)
        state = server.server.server_state
        assert state.connections
        assert waited_for(lambda: not state.connections, 60)
        assert scheduler(server).stats().ended["cancelled"] == 1


def test_a_client_that_leaves_while_its_model_is_opened(red_square: str) -> None:
    go = threading.Event()

    def load(source: str) -> Any:
        go.wait(30)
        return vlmport.load(source, threads=1)

    with running(load=load) as server, server.http() as client:
        asked = {"model": MODEL, "messages": question(red_square)}
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/chat/completions", json=asked, timeout=0.3)
        assert waited_for(lambda: '"status": 499' in server.log.getvalue())
        go.set()
        answer = client.post("/v1/chat/completions", json=asked)  # the model was opened once
        assert answer.status_code == 200
        assert scheduler(server).stats().ended["finished"] == 1
        (model,) = server.server.app.state.service.models.open_models
        assert waited_for(lambda: not model.in_use)


def test_no_model_is_opened_after_the_shutdown_began() -> None:
    go, opened = threading.Event(), []

    def load(source: str) -> Any:
        opened.append(source)
        go.wait(30)
        return vlmport.load("shapes", threads=1)

    async def tried() -> list[Any]:
        models = Models({"a": "a", "b": "b"}, Settings(), load=load)

        async def asked(name: str) -> None:
            async with models.lease(name):
                raise AssertionError("the server shuts down")

        waiting = [asyncio.create_task(asked(name)) for name in ("a", "b")]
        while not opened:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(models.close(0))
        await asyncio.sleep(0.05)
        go.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        await closing
        assert models.open_models == ()
        return found

    errors = asyncio.run(tried())
    assert [error.code for error in errors] == ["server.draining"] * 2
    assert opened == ["a"]


def test_what_asyncio_reports_is_a_line_of_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("a callback failed")

    with running() as server:
        assert server.server._loop is not None
        server.server._loop.call_soon_threadsafe(broken)
        logging.getLogger("asyncio").error("socket.send() raised\n%s", "second line")
        with server.http() as client:
            client.get("/health")
    events = {one["event"]: one for one in map(json.loads, server.log.getvalue().splitlines())}
    assert events["defect"]["type"] == "RuntimeError"
    assert "socket.send()" in events["asyncio"]["text"]
    assert "".join(capfd.readouterr()) == ""


def test_a_body_that_is_cut_off_is_no_defect() -> None:
    with running() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
                "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
            )
            time.sleep(0.2)
        assert waited_for(lambda: "/v1/chat" in server.log.getvalue())
        (line,) = [json.loads(one) for one in server.log.getvalue().splitlines()]
        assert (line["event"], line["status"]) == ("request", 499)


def test_clients_that_vanish_leave_nothing_behind(red_square: str) -> None:
    with running() as server:
        asked = json.dumps(
            {"model": MODEL, "messages": question(red_square), "stream": True, **LONG}
        ).encode()
        host, port = server.url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n"
        ).encode()

        def vanish(number: int) -> None:
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(head + asked)
                if number % 2:
                    connection.recv(300)

        for _ in range(5):
            threads = [threading.Thread(target=vanish, args=(number,)) for number in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        models = server.server.app.state.service.models
        assert waited_for(lambda: not models.open_models[0].in_use)
        stats = scheduler(server).stats()
        assert (stats.running_rows, stats.waiting) == (0, 0)
        server_state = server.server.server_state
        assert waited_for(lambda: not server_state.connections and not server_state.tasks)


def test_a_full_queue_is_429_with_retry_after(red_square: str) -> None:
    with running(max_running=1, max_queue=0) as server:
        client = server.openai()
        first = client.chat.completions.create(
            model=MODEL, messages=question(red_square), stream=True, extra_body=LONG
        )
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=question(red_square))
        assert caught.value.code == "server.queue-full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        first.close()
        assert waited_for(lambda: scheduler(server).stats().running_rows == 0)
        answer = client.chat.completions.create(model=MODEL, messages=question(red_square))
        assert answer.choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(red_square: str, stream: bool) -> None:
    with running() as server:
        client = server.openai(timeout=60)
        client.chat.completions.create(model=MODEL, messages=question(red_square))
        asked: Any = {"model": MODEL, "messages": question(red_square), "stream": stream, **LONG}
        with server.http() as http:
            if stream:
                with http.stream("POST", "/v1/chat/completions", json=asked) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.TimeoutException):
                    http.post("/v1/chat/completions", json=asked, timeout=0.15)
        assert waited_for(lambda: scheduler(server).stats().running_rows == 0)
        assert scheduler(server).stats().ended["cancelled"] == 1


def test_a_time_limit_before_the_first_token_is_not_repeated() -> None:
    with running(time_limit=1e-9) as server:  # over before the engine looks
        client = server.openai().with_options(max_retries=3)
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model=MODEL, messages=HI)  # type: ignore[arg-type]
        assert (caught.value.status_code, caught.value.code) == (408, "server.time-limit")
        assert waited_for(lambda: "/v1/chat" in server.log.getvalue())
        assert server.log.getvalue().count("/v1/chat/completions") == 1


def test_a_time_limit_cuts_the_answer(monkeypatch: pytest.MonkeyPatch, red_square: str) -> None:
    def ends_now(job: Job, now: float) -> str | None:
        first = job.times.first_token
        return "time-limit" if first is not None and now > first + 0.02 else None

    monkeypatch.setattr(Job, "ends_now", ends_now)
    with running() as server, server.http() as http:
        asked = {"model": MODEL, "messages": question(red_square), **LONG}
        whole = http.post("/v1/chat/completions", json=asked).json()
        assert whole["choices"][0]["finish_reason"] == "length"
        assert 0 < whole["usage"]["completion_tokens"] < 400
        assert whole["choices"][0]["message"]["content"]
        streamed = http.post("/v1/chat/completions", json={**asked, "stream": True}).text
        assert '"finish_reason": "length"' in streamed
        assert '"error"' not in streamed
        options = {"min_new_tokens": 400, "max_output_tokens": 400}
        response = http.post("/v1/responses", json={"model": MODEL, "input": "hi", **options})
        assert response.json()["status"] == "incomplete"
        path = "/caption?min_new_tokens=400&max_new_tokens=400"
        caption = http.post(path, content=RED_SQUARE.read_bytes())
        assert error_of(caption) == (408, "server.time-limit")


def test_a_form_of_more_files_than_the_queue_takes() -> None:
    image = RED_SQUARE.read_bytes()
    with running({"shapes": "shapes"}, max_running=2, max_queue=1) as server:
        files = [("images", (f"{n}.png", image)) for n in range(6)]
        with server.http() as http:
            found = http.post("/caption", files=files).json()["captions"]
    assert [one["file"] for one in found] == [f"{n}.png" for n in range(6)]
    assert {one["caption"] for one in found} == {"a red square on a white background"}


class Images:
    """Fetches images of 400 bytes, but for two names."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    async def fetch(self, url: str) -> bytes:
        if "bad" in url:
            raise ImageError("no image", code="image.not-fetched")
        if "slow" in url:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.append(url)
                raise
        return b"a" * 400


def test_the_first_bad_image_ends_the_other_fetches() -> None:
    images, urls = Images(), ["http://a/slow", "http://a/bad"]

    async def tried() -> list[str]:
        with raises(ImageError, "image.not-fetched"):
            await read_images(urls, Settings(), images)
        return list(images.cancelled)

    assert asyncio.run(tried()) == ["http://a/slow"]


def test_fetched_images_count_together() -> None:
    settings = Settings(max_body_bytes=1000)
    two = asyncio.run(read_images(["http://a/1"] * 2, settings, Images()))
    assert two == [b"a" * 400] * 2
    with raises(RequestError, "server.body-too-large", "1,000"):
        asyncio.run(read_images(["http://a/1"] * 3, settings, Images()))


def test_models_are_closed_when_others_are_needed() -> None:
    sources = {"shapes": "shapes", "shapes-smolvlm": "shapes-smolvlm", "again": "shapes"}
    with running(sources, max_models=2) as server:
        models = server.server.app.state.service.models

        def names() -> list[str]:
            return [one.name for one in models.open_models]

        client = server.openai()
        assert names() == []
        for name, expected in (
            ("shapes-smolvlm", ["shapes-smolvlm"]),
            ("shapes", ["shapes-smolvlm", "shapes"]),
            ("shapes-smolvlm", ["shapes", "shapes-smolvlm"]),
            ("again", ["shapes-smolvlm", "again"]),
        ):
            with server.http() as http:
                path = f"/caption?model={name}"
                response = http.post(path, content=RED_SQUARE.read_bytes())
            assert response.status_code == 200, response.text
            assert names() == expected
        assert client.models.list().data[2].id == "again"


def test_busy_models_are_not_closed(red_square: str) -> None:
    sources = {"shapes": "shapes", "shapes-smolvlm": "shapes-smolvlm"}
    with running(sources, max_models=1) as server:
        client = server.openai()
        stream = client.chat.completions.create(
            model=MODEL, messages=question(red_square), stream=True, extra_body=LONG
        )
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="shapes", messages=question(red_square))
        assert caught.value.code == "server.models-busy"
        stream.close()


def test_draining_lets_streams_end_and_refuses_others(red_square: str) -> None:
    with running() as server:
        object.__setattr__(server.server.settings, "grace", 20.0)
        client = server.openai()
        asked: Any = {"model": MODEL, "messages": question(red_square)}
        stream = client.chat.completions.create(
            **asked, stream=True, extra_body={"min_new_tokens": 60, "max_tokens": 60}
        )
        chunks = [next(iter(stream))]
        server.server.drain()
        with server.http() as http:
            assert waited_for(lambda: http.get("/ready").status_code == 503)
            refused = http.post("/v1/chat/completions", json=asked)
            assert error_of(refused) == (503, "server.draining")
            assert http.get("/health").status_code == 200
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stream_that_is_cut_says_so(red_square: str) -> None:
    with running() as server:
        client = server.openai()
        stream = client.chat.completions.create(
            model=MODEL, messages=question(red_square), stream=True, extra_body=LONG
        )
        next(iter(stream))
        server.server.drain()
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "server.draining"


def test_many_clients_have_the_answers_that_one_has(red_square: str) -> None:
    with running() as server:
        client = server.openai(timeout=60)
        asked = [
            question(red_square, text)
            for text in ("What color is the square?", "How many squares are there?", "What is it?")
        ]

        def answer(number: int) -> str | None:
            made = client.chat.completions.create(
                model=MODEL,
                messages=asked[number % 3],
                seed=number,
                temperature=1.0 if number % 2 else 0.0,
            )
            return made.choices[0].message.content

        alone = [answer(number) for number in range(12)]
        together: dict[int, str | None] = {}
        threads = [
            threading.Thread(target=lambda n=n: together.update({n: answer(n)})) for n in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[number] for number in range(12)] == alone


def test_measurements(red_square: str) -> None:
    with running() as server, server.http() as client:
        for _ in range(2):
            body = {"model": MODEL, "messages": question(red_square)}
            client.post("/v1/chat/completions", json=body)
        client.post("/v1/chat/completions", json={"model": "none", "messages": HI})
        lines = client.get("/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    of_model = f'{{model="{MODEL}"}}'
    path = 'path="/v1/chat/completions"'
    assert found[f'vlmport_requests_total{{{path},status="200"}}'] == "2.0"
    assert found[f'vlmport_requests_total{{{path},status="404"}}'] == "1.0"
    assert found[f"vlmport_time_to_first_token_seconds_count{of_model}"] == "2.0"
    assert float(found[f"vlmport_time_between_tokens_seconds_count{of_model}"]) > 0
    assert found[f"vlmport_images_total{of_model}"] == "2.0"
    assert found[f"vlmport_images_encoded_total{of_model}"] == "1.0"
    assert float(found[f"vlmport_decode_tokens_total{of_model}"]) > 0
    assert found[f"vlmport_running{of_model}"] == "0.0"
    assert found[f'vlmport_answers_total{{model="{MODEL}",reason="finished"}}'] == "2.0"
    assert float(found["vlmport_received_bytes_total"]) > 2000
    assert json.dumps(found)
