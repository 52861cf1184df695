"""Schemas and tools: what comes out is valid, whatever the model would rather say."""

from __future__ import annotations

import json
from typing import Any

import fastjsonschema
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serve.running import Running
from tests.serve.strict import validated
from tests.serve.test_chat import posted, question, streamed

PARAMETERS = {
    "type": "object",
    "properties": {
        "color": {"$ref": "#/$defs/color"},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
    "$defs": {"color": {"enum": ["red", "blue"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "report", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "nothing", "description": "Does nothing."}},
]
CHECK = fastjsonschema.compile(PARAMETERS)
NAMED = {"type": "function", "function": {"name": "report"}}


def test_an_answer_fits_its_schema(server: Running, red_square: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "report", "schema": PARAMETERS}}
    body = posted(server, messages=question(red_square), response_format=form, max_tokens=60)
    found = validated(ChatCompletion, body).choices[0]
    assert found.finish_reason == "stop"
    CHECK(json.loads(found.message.content or ""))
    text = "".join(
        one["choices"][0]["delta"].get("content", "")
        for one in streamed(
            server, messages=question(red_square), response_format=form, max_tokens=60
        )
    )
    assert text == found.message.content


def test_the_parse_helper_of_the_client_reads_a_pydantic_model(
    server: Running, red_square: str
) -> None:
    from pydantic import BaseModel

    class Square(BaseModel):
        is_red: bool

    answer = server.openai().chat.completions.parse(
        model="shapes-smolvlm", messages=question(red_square), response_format=Square
    )
    assert isinstance(answer.choices[0].message.parsed, Square)


def test_an_answer_matches_a_regex(server: Running, red_square: str) -> None:
    body = posted(server, messages=question(red_square), regex="(yes|no)")
    assert body["choices"][0]["message"]["content"] in ("yes", "no")


def test_json_object(server: Running, red_square: str) -> None:
    asked: dict[str, Any] = {
        "messages": question(red_square),
        "response_format": {"type": "json_object"},
        "max_tokens": 100,
    }
    choice = posted(server, **asked)["choices"][0]
    text = choice["message"]["content"]
    assert text.startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_tool_is_called_with_valid_arguments(
    server: Running, red_square: str, choice: Any
) -> None:
    tools = TOOLS[:1]
    asked = {"messages": question(red_square), "tools": tools, "max_tokens": 120}
    body = posted(server, **asked, tool_choice=choice)
    found = validated(ChatCompletion, body).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "report"
    CHECK(json.loads(call.function.arguments))

    chunks = [
        validated(ChatCompletionChunk, one) for one in streamed(server, **asked, tool_choice=choice)
    ]
    parts = [part for one in chunks for part in one.choices[0].delta.tool_calls or ()]
    assert parts[0].function is not None
    assert parts[0].function.name == "report"
    assert parts[0].id
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    assert arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(one.choices[0].delta.content for one in chunks)


def test_json_has_the_rest_of_the_context(server: Running, red_square: str) -> None:
    """A bundle's default length, 40 tokens here, would cut it."""
    schema = {"type": "string", "minLength": 400, "maxLength": 400}
    tool = {"name": "f", "parameters": {"properties": {"a": schema}, "required": ["a"]}}
    form = {"name": "a", "schema": schema}
    for change, reason in (
        ({"response_format": {"type": "json_schema", "json_schema": form}}, "stop"),
        (
            {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"},
            "tool_calls",
        ),
        ({"regex": "[ab]{90}"}, "stop"),
    ):
        body = posted(server, messages=question(red_square), **change)
        assert body["choices"][0]["finish_reason"] == reason
        assert body["usage"]["completion_tokens"] > 40


def test_auto_gives_a_text_or_a_call(server: Running, red_square: str) -> None:
    body = posted(server, messages=question(red_square), tools=TOOLS, max_tokens=120)
    choice = validated(ChatCompletion, body).choices[0]
    if choice.finish_reason == "tool_calls":
        assert choice.message.tool_calls
    else:
        assert choice.message.content
    text = "".join(
        one["choices"][0]["delta"].get("content", "")
        for one in streamed(server, messages=question(red_square), tools=TOOLS, max_tokens=120)
    )
    assert text == (choice.message.content or "")


def test_a_cut_call_is_no_call(server: Running, red_square: str) -> None:
    """Half of its arguments would be no JSON."""
    asked = {"messages": question(red_square), "tools": TOOLS, "tool_choice": "required"}
    choice = posted(server, **asked, max_tokens=4)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    text = "".join(
        one["choices"][0]["delta"].get("content", "")
        for one in streamed(server, **asked, max_tokens=4)
    )
    assert text == choice["message"]["content"]


def test_none_offers_no_tool(server: Running, red_square: str) -> None:
    plain = posted(server, messages=question(red_square))
    none = posted(server, messages=question(red_square), tools=TOOLS, tool_choice="none")
    assert none["choices"] == plain["choices"]
    assert none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_the_result_of_a_call_goes_back(server: Running, red_square: str) -> None:
    call = {"id": "call-1", "type": "function"}
    call["function"] = {"name": "report", "arguments": '{"color": "red", "count": 1}'}  # type: ignore[assignment]
    messages = [
        *question(red_square),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "thank you"},
    ]
    posted(server, messages=messages, tools=TOOLS, max_tokens=8)
