"""Bodies that are inside the limit of bytes, and would take minutes or gigabytes to read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.errors import raises
from tests.serve.running import Running
from tests.serve.test_chat import MODEL
from tests.serve.test_errors import HI, refused
from vlmport.serve.api_errors import MANY, RequestError, of_validation
from vlmport.serve.responses_schemas import ResponsesRequest
from vlmport.serve.schemas import MAX_MESSAGES, ChatRequest

WRONG = [0] * 5000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": WRONG}),
        (ChatRequest, {"messages": [{"role": "user", "content": WRONG}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": WRONG}]}),
        (ChatRequest, {"messages": HI, "stop": WRONG}),
        (ChatRequest, {"messages": HI, "tools": WRONG}),
        (ChatRequest, {"messages": HI, "modalities": WRONG}),
        (ResponsesRequest, {"input": WRONG}),
        (ResponsesRequest, {"input": [{"role": "user", "content": WRONG}]}),
        (ResponsesRequest, {"input": "hi", "tools": WRONG}),
        (ResponsesRequest, {"input": "hi", "include": WRONG}),
    ],
)
def test_a_list_ends_at_its_first_wrong_item(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps({"model": MODEL, **body}))
    assert caught.value.error_count() <= 40


def test_many_problems_are_not_described_one_by_one(server: Running) -> None:
    unknown = {f"x{number}": 0 for number in range(5000)}
    bodies = ({"messages": HI, **unknown}, {"messages": HI, "logit_bias": dict.fromkeys(unknown)})
    for body in bodies:
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate_json(json.dumps({"model": MODEL, **body}))
        assert caught.value.error_count() > MANY
        with raises(RequestError, "server.wrong-value", "5000"):
            raise of_validation(caught.value)
        refused(server, {"model": MODEL, **body}, 400, "server.wrong-value")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": HI * (MAX_MESSAGES + 1)}, "messages"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 201}, "stop"),
        ({"stop": ["a" * 201]}, "stop[0]"),
        ({"logit_bias": {str(number): 1 for number in range(1001)}}, "logit_bias"),
    ],
)
def test_lists_have_a_maximum(server: Running, change: dict[str, Any], param: str) -> None:
    refused(server, {"model": MODEL, "messages": HI, **change}, 400, "server.wrong-value", param)


@pytest.mark.parametrize("item", [b"0", b'{"role":"user","content":"a"}', b"[]", b"{}"])
def test_a_body_of_very_many_values_is_not_parsed(server: Running, item: bytes) -> None:
    body = b'{"model":"x","messages":[' + b",".join([item] * 500_000) + b"]}"
    refused(server, body, 400, "server.too-many-values")


@pytest.mark.parametrize(
    "change",
    [
        {"regex": "a" * 400_001},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"description": "a" * 400_001}},
            }
        },
    ],
)
def test_all_texts_count(server: Running, change: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": HI, **change}
    refused(server, body, 400, "server.text-too-long", "messages")


def test_a_schema_that_is_nested_too_deeply(server: Running) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(90):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    body = {"model": MODEL, "messages": HI, "response_format": form}
    refused(server, body, 400, "grammar.invalid", "response_format")
