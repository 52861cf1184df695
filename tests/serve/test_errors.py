"""Errors: OpenAI's JSON, the right status, our hint, and never a traceback."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.serve.running import Running, running
from tests.serve.test_chat import MODEL, question

JSON = {"type": "json_object"}
HI = [{"role": "user", "content": "hi"}]


def refused(server: Running, body: Any, status: int, code: str, param: str | None = None) -> str:
    """Fail unless the body gets this error; returns its message."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    with server.http() as client:
        response = client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"temprature": 1}, "server.unknown-field", "temprature"),
        ({"functions": []}, "server.unknown-field", "functions"),
        ({"reasoning_effort": "low"}, "server.unknown-field", "reasoning_effort"),
        ({"temperature": 3}, "server.wrong-value", "temperature"),
        ({"temperature": "hot"}, "server.wrong-value", "temperature"),
        ({"top_p": float("nan")}, "server.wrong-value", "top_p"),
        ({"n": 0}, "server.wrong-value", "n"),
        ({"n": 9}, "server.too-many-answers", "n"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "option.contradiction", "max_tokens"),
        ({"temperature": 0.7, "do_sample": False}, "option.contradiction", "temperature"),
        ({"top_p": 0.7, "do_sample": False}, "option.contradiction", "top_p"),
        ({"temperature": 0, "do_sample": True}, "option.contradiction", "temperature"),
        ({"top_logprobs": 2}, "option.contradiction", "top_logprobs"),
        ({"logit_bias": {"red": 1}}, "server.wrong-value", "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "option.wrong-value", "logit_bias"),
        ({"messages": []}, "server.wrong-value", "messages"),
        ({"messages": [{"role": "boss"}]}, "server.wrong-value", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "server.wrong-value",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "server.wrong-value",
            "messages[0].content[0].text",
        ),
        ({"messages": question("data:image/png;base64,%%%")}, "image.bad-base64", None),
        ({"messages": question("https://example.com/a.png")}, "image.url-not-allowed", None),
        ({"messages": question("file:///etc/passwd")}, "image.url-invalid", None),
        ({"messages": question("/etc/passwd")}, "image.url-invalid", None),
        ({"messages": question("data:image/png;base64,aGk=")}, "image.not-a-picture", None),
        ({"regex": "("}, "grammar.invalid", "regex"),
        ({"regex": "a", "response_format": JSON}, "option.contradiction", "regex"),
        ({"num_beams": 99}, "option.wrong-value", "num_beams"),
        ({"n": 8, "num_beams": 3}, "option.contradiction", "n"),
        ({"max_tokens": 5, "min_new_tokens": 6}, "option.contradiction", "min_new_tokens"),
        ({"image_options": {"size": 5}}, "option.unknown", "image_options"),
        ({"tool_choice": "required"}, "server.unknown-tool", "tool_choice"),
        ({"messages": [{"role": "user", "content": "red " * 9000}]}, "prompt.too-long", None),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong(
    server: Running, change: dict[str, Any], code: str, param: str | None
) -> None:
    message = refused(server, {"model": MODEL, "messages": HI, **change}, 400, code, param)
    assert "hint: " in message


def test_errors_name_the_fields_of_the_request(server: Running) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    function = {"name": "f", "parameters": bad}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": bad}}
    for change, param in (
        ({"tools": [{"type": "function", "function": function}]}, "tools"),
        ({"response_format": form}, "response_format"),
    ):
        body = {"model": MODEL, "messages": HI, **change}
        message = refused(server, body, 400, "grammar.invalid", param)
        assert "lark" not in message
        assert "json_schema=" not in message
    with server.http() as client:
        body = {
            "model": MODEL,
            "input": "hi",
            "text": {"format": {**form["json_schema"], "type": "json_schema"}},
        }  # type: ignore[dict-item]
        error = client.post("/v1/responses", json=body).json()["error"]
    assert error["param"] == "text.format"


def test_the_most_likely_token_needs_no_options_of_sampling(
    server: Running, red_square: str
) -> None:
    asked = {"model": MODEL, "messages": question(red_square), "temperature": 0}
    shapes = {"top_p": 0.5, "top_k": 5, "min_p": 0.1, "typical_p": 0.5, "seed": 3}
    with server.http() as client:
        answers = [
            client.post("/v1/chat/completions", json=body).json()["choices"]
            for body in (asked, {**asked, **shapes})
        ]
    assert answers[0] == answers[1]


def test_an_unknown_model(server: Running) -> None:
    asked = {"model": "gpt-4o", "messages": HI}
    message = refused(server, asked, 404, "server.unknown-model", "model")
    assert MODEL in message
    with pytest.raises(openai.NotFoundError):
        server.openai().chat.completions.create(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 30_000, b"null"])
def test_a_body_that_is_no_json_object(server: Running, body: bytes) -> None:
    code = "server.wrong-value" if body == b"null" else "server.not-json"
    refused(server, body, 400, code)


def test_fields_without_effect_are_taken(server: Running, red_square: str) -> None:
    from vlmport.serve.schemas import NO_EFFECT, NoEffect

    values: dict[str, Any] = dict.fromkeys(NO_EFFECT, "x")
    values |= {"metadata": {"a": "b"}, "store": True, "parallel_tool_calls": False}
    assert set(NoEffect.model_fields) == set(NO_EFFECT)
    answers = [
        server.openai().chat.completions.create(
            model=MODEL, messages=question(red_square), **one
        ).choices[0].message.content
        for one in ({}, values)
    ]  # fmt: skip
    assert answers[0] == answers[1]


def test_null_is_no_value(server: Running, red_square: str) -> None:
    """Clients send fields that they have not set."""
    from vlmport.serve.schemas import ChatRequest

    nothing = dict.fromkeys(set(ChatRequest.model_fields) - {"model", "messages"})
    body = {"model": MODEL, "messages": question(red_square)}
    with server.http() as client:
        plain, full = (
            client.post("/v1/chat/completions", json=one).json() for one in (body, nothing | body)
        )
    assert full["choices"] == plain["choices"]


def test_paths_and_methods(server: Running) -> None:
    with server.http() as client:
        for method, path, status, code in (
            ("GET", "/v1/embeddings", 404, "server.no-such-path"),
            ("GET", "/v1/chat/completions", 405, "server.wrong-method"),
            ("POST", "/health", 405, "server.wrong-method"),
            ("GET", "/../etc/passwd", 404, "server.no-such-path"),
        ):
            response = client.request(method, path)
            assert response.status_code == status
            assert response.json()["error"]["code"] == code


def test_probes_may_ask_for_the_head_only(server: Running) -> None:
    with server.http() as client:
        for path in ("/health", "/ready"):
            response = client.head(path)
            assert (response.status_code, response.content) == (200, b"")


def test_the_log_has_the_beginning_of_a_long_name(server: Running) -> None:
    refused(server, {"model": "m" * 100_000, "messages": HI}, 404, "server.unknown-model", "model")
    assert max(map(len, server.log.getvalue().splitlines())) < 1000


def test_an_error_after_the_stream_was_asked_for_has_its_status(server: Running) -> None:
    asked = {"model": MODEL, "messages": question("data:image/png;base64,aGk="), "stream": True}
    refused(server, asked, 400, "image.not-a-picture")


def test_requests_have_ids_and_the_log_has_no_content(server: Running, red_square: str) -> None:
    with server.http() as client:
        given = client.get("/health", headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        odd = client.get("/health", headers={"x-request-id": "a b\tc"})
        assert odd.headers["x-request-id"] != "a b\tc"
        secret = {"model": MODEL, "messages": question(red_square, "my secret question")}
        client.post("/v1/chat/completions", json=secret)
    lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    assert any(one["request_id"] == "mine-1" and one["path"] == "/health" for one in lines)
    assert all(one["status"] and one["method"] for one in lines if one["event"] == "request")
    last = [one for one in lines if one["path"] == "/v1/chat/completions"][-1]
    assert last["model"] == MODEL
    assert last["image_tokens"] > 0
    assert last["new_tokens"] > 0
    assert "secret" not in server.log.getvalue()
    assert "base64" not in server.log.getvalue()


def test_a_defect_is_an_answer_and_a_line_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    def load(source: str) -> Any:
        raise RuntimeError("broken\nsecond line")

    with running(load=load) as server:
        message = refused(server, {"model": MODEL, "messages": HI}, 500, "program.defect")
        assert "RuntimeError" in message
        assert "broken" not in message
        with server.http() as client:
            assert client.get("/health").status_code == 200
        events = [json.loads(line) for line in server.log.getvalue().splitlines()]
        defect = next(one for one in events if one["event"] == "defect")
        assert defect["type"] == "RuntimeError"
        assert "test_errors.py" in defect["at"]
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed


def test_hosts_and_origins() -> None:
    with running(allowed_hosts=("captions.lan",), cors_origins=("https://app.example",)) as server:

        def status(**headers: str) -> httpx.Response:
            with server.http() as client:
                return client.get("/v1/models", headers=headers)

        assert status().status_code == 200
        assert status(host="localhost:1234").status_code == 200
        assert status(host="captions.lan").status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""):
            assert status(host=host).json()["error"]["code"] == "server.wrong-host"
        assert status(origin=server.url).status_code == 200
        allowed = status(origin="https://app.example")
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        foreign = status(origin="https://evil.example")
        assert foreign.json()["error"]["code"] == "server.foreign-origin"
        assert "access-control-allow-origin" not in foreign.headers
        assert status(origin="null").status_code == 403


def test_keys() -> None:
    with running(api_keys=("first-key-1", "second-key-2")) as server:
        for key in ("first-key-1", "second-key-2"):
            server.key = key
            assert server.openai().models.list().data
        for key in ("first-key", "third-key-3", "first-key-1x", ""):
            server.key = key or "none"
            with pytest.raises(openai.AuthenticationError) as caught:
                server.openai().models.list()
            assert caught.value.code == "server.unauthorized"
        with server.http() as client:
            assert client.get("/health").status_code == 200
            assert client.get("/ready").status_code == 200
            for path in ("/metrics", "/docs", "/openapi.json", "/"):
                response = client.get(path)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
