"""/v1/responses, asked by the unmodified openai client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.serve.running import Running
from tests.serve.strict import validated
from tests.serve.test_chat import MODEL, posted, question
from tests.serve.test_tools import CHECK, PARAMETERS

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS = [{"type": "function", "name": "report", "parameters": PARAMETERS, "strict": True}]


def asked(image: str, text: str = "What color is the square?") -> list[Any]:
    parts = [
        {"type": "input_image", "image_url": image},
        {"type": "input_text", "text": text},
    ]
    return [{"role": "user", "content": parts}]


def respond(server: Running, **body: Any) -> dict[str, Any]:
    with server.http() as client:
        response = client.post("/v1/responses", json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(server: Running, **body: Any) -> list[dict[str, Any]]:
    with server.http() as client:
        response = client.post("/v1/responses", json={"model": MODEL, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    for one in events:
        validated(type(EVENT.validate_python(one)), one)
    return events


def test_the_answer_is_that_of_chat_completions(server: Running, red_square: str) -> None:
    expected = posted(server, messages=question(red_square))
    body = respond(server, input=asked(red_square))
    found = validated(Response, body)
    assert found.output_text == expected["choices"][0]["message"]["content"]
    assert found.status == "completed"
    assert found.usage is not None
    assert found.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert found.usage.output_tokens == expected["usage"]["completion_tokens"]
    client = server.openai()
    answer = client.responses.create(model=MODEL, input=asked(red_square))
    assert answer.output_text == found.output_text


def test_a_stream_of_events(server: Running, red_square: str) -> None:
    wanted = {"input": asked(red_square), "include": ["message.output_text.logprobs"]}
    whole = respond(server, **wanted, top_logprobs=1)
    events = events_of(server, **wanted, top_logprobs=1)
    kinds = [one["type"] for one in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    text = whole["output"][0]["content"][0]
    assert "".join(one["delta"] for one in deltas) == text["text"]
    tokens = [token for one in deltas for token in one["logprobs"]]
    assert [(one["token"], one["logprob"]) for one in tokens] == [
        (one["token"], one["logprob"]) for one in text["logprobs"]
    ]
    assert all(len(one["top_logprobs"]) == 1 for one in (*tokens, *text["logprobs"]))
    last = events[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    with server.openai().responses.stream(model=MODEL, input=asked(red_square)) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text["text"]


def test_a_cut_answer_is_incomplete(server: Running, red_square: str) -> None:
    body = respond(server, input=asked(red_square, "Describe the picture."), max_output_tokens=2)
    assert validated(Response, body).status == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    events = events_of(
        server, input=asked(red_square, "Describe the picture."), max_output_tokens=2
    )
    assert events[-1]["type"] == "response.incomplete"


def test_schemas_and_tools(server: Running, red_square: str) -> None:
    class Square(BaseModel):
        is_red: bool

    parsed = server.openai().responses.parse(
        model=MODEL, input=asked(red_square), text_format=Square
    )
    assert isinstance(parsed.output_parsed, Square)
    wanted = {"input": asked(red_square), "tools": TOOLS, "max_output_tokens": 120}
    for choice in ("required", {"type": "function", "name": "report"}):
        body = respond(server, **wanted, tool_choice=choice)
        (call,) = validated(Response, body).output
        assert call.type == "function_call"
        CHECK(json.loads(call.arguments))
        events = events_of(server, **wanted, tool_choice=choice)
        arguments = "".join(
            one["delta"]
            for one in events
            if one["type"] == "response.function_call_arguments.delta"
        )
        assert arguments == call.arguments
        assert events[-1]["response"]["output"][0]["arguments"] == call.arguments


def test_a_conversation(server: Running, red_square: str) -> None:
    first = respond(server, input=asked(red_square), instructions="Answer in one word.")
    call = {"type": "function_call", "call_id": "c", "name": "report", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "done"}
    again = [
        *asked(red_square),
        *first["output"],
        call,
        output,
        {"role": "user", "content": "How many squares are there?"},
    ]
    respond(server, input=again, instructions="Answer in one word.", max_output_tokens=4)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"previous_response_id": "resp-1"}, "server.unknown-field", "previous_response_id"),
        ({"background": True}, "server.wrong-value", "background"),
        ({"frequency_penalty": 1}, "server.unknown-field", "frequency_penalty"),
        ({"tools": [{"type": "web_search"}]}, "server.wrong-value", "tools[0].type"),
        ({"input": [{"role": "user", "content": [5]}]}, "server.wrong-value", None),
        ({"input": []}, "server.wrong-value", None),
        ({"temperature": 9}, "server.wrong-value", "temperature"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Running, change: Any, code: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().responses.create(model=MODEL, extra_body={"input": "hi", **change})
    assert caught.value.code in (code, "server.unknown-field")
    assert param is None or caught.value.param == param
