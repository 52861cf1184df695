"""POST /v1/responses: OpenAI's newer API, over the same jobs as chat completions.

Nothing is stored: an answer's id means nothing to a later request.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from vlmport.errors import VlmportError
from vlmport.runtime.response import Answer
from vlmport.runtime.scheduling import Event, Finished, Job, Piece
from vlmport.serve import chat, chat_options, tools
from vlmport.serve.api_errors import body_of, defect
from vlmport.serve.responses_schemas import (
    FlatNamedTool,
    ResponsesRequest,
    format_of,
    messages_of,
    tool_choice_of,
    tools_of,
)
from vlmport.serve.schemas import ChatRequest, NoEffect, OwnOptions
from vlmport.serve.service import Service, new_id
from vlmport.serve.token_texts import logprobs_of
from vlmport.serve.waiting import failure

SAME = (*OwnOptions.model_fields, *NoEffect.model_fields, "temperature", "top_p", "seed", "stream")
RENAMED = {
    **chat_options.RENAMED,
    "max_new_tokens": "max_output_tokens",
    "json_schema": "text.format",
}


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """Return the same request in the form of chat completions."""
    return ChatRequest(
        model=request.model,
        messages=messages_of(request),
        max_completion_tokens=request.max_output_tokens,
        response_format=format_of(request),
        tools=tools_of(request),
        tool_choice=tool_choice_of(request),
        logprobs=request.reports_logprobs or None,
        top_logprobs=request.top_logprobs if request.reports_logprobs else None,
        **{name: getattr(request, name) for name in SAME},
    )


class Reply:
    """The answer to a request, as far as it has come."""

    def __init__(self, request: ResponsesRequest, started: chat.Started):
        self.request, self.started = request, started
        self.id, self.item_id = new_id("resp"), new_id("msg")
        self.made = 0

    def body(self, status: str, output: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write the object `response`."""
        asked, started = self.request, self.started
        ended = status in ("completed", "incomplete")
        choice = asked.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": started.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": started.model.name,
            "output": list(output),
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "temperature": asked.temperature,
            "text": _text(asked),
            "tool_choice": (
                choice.model_dump() if isinstance(choice, FlatNamedTool) else choice or "auto"
            ),
            "tools": [
                {"strict": None, "parameters": None, **one.model_dump(exclude_none=True)}
                for one in asked.tools or ()
            ],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": _usage(started.job, self.made) if ended else None,
            "user": asked.user,
        }

    def item(self, text: str, logprobs: Sequence[Any], status: str) -> dict[str, Any]:
        """Write an item of the output: a message, or a call where the text is one."""
        call = tools.read_call(text) if self.started.offer else None
        if call is not None:
            return {
                "type": "function_call",
                "id": f"fc{self.item_id.removeprefix('msg')}",
                "call_id": new_id("call"),
                "name": call.name,
                "arguments": call.arguments,
                "status": status,
            }
        return self.message([self.part(text, logprobs)], status)

    def message(self, content: Sequence[Any], status: str) -> dict[str, Any]:
        """Write a message of the output."""
        return {
            "type": "message",
            "id": self.item_id,
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    @staticmethod
    def part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        """Write the text of a message."""
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": list(logprobs),
        }

    def logprobs(self, reported: Any, ends_with_stop_token: bool) -> list[Any]:
        """Write log-probabilities; none where none were asked for."""
        tokenizer = self.started.model.vlm.prompter.tokenizer
        found = logprobs_of(tokenizer, reported, ends_with_stop_token)
        return [] if found is None else [_with_bytes(one) for one in found["content"]]


def _with_bytes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Here `bytes` is a list always."""
    top = [{**one, "bytes": one["bytes"] or []} for one in entry["top_logprobs"]]
    return {**entry, "bytes": entry["bytes"] or [], "top_logprobs": top}


def _of_event(logprobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write the log-probabilities of an event, which have no bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"]} for top in one["top_logprobs"]
            ],
        }
        for one in logprobs
    ]


def _text(request: ResponsesRequest) -> dict[str, Any]:
    form = request.text.format if request.text else None
    if form is None:
        return {"format": {"type": "text"}}
    return {"format": form.model_dump(exclude_none=True, by_alias=True)}


def _usage(job: Job, made: int) -> dict[str, Any]:
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": job.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": job.image_tokens,
        },
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + made,
    }


async def start(request: ResponsesRequest, service: Service) -> Reply:
    """Check a request and submit its job. Raises errors of ours."""
    return Reply(request, await chat.start(chat_request(request), service, RENAMED))


async def complete(reply: Reply, request: Request) -> dict[str, Any]:
    """Wait for the answer, and write the whole response."""
    return _ended(reply, await chat.whole_answer(reply.started, request))


def _ended(reply: Reply, answer: Answer) -> dict[str, Any]:
    reply.made = len(answer.token_ids)
    status = "completed" if answer.stop_reason in ("stop", "stop_string") else "incomplete"
    logprobs = reply.logprobs(answer.logprobs, answer.stop_reason == "stop")
    return reply.body(status, [reply.item(answer.text, logprobs, status)])


async def open_stream(reply: Reply, request: Request) -> AsyncIterator[Mapping[str, Any]]:
    """Return the events of a stream, once the first event of the job is there."""
    first, events = await chat.first_of(reply.started, request)
    return _numbered(_events(reply, first, events), reply.started.job)


async def _numbered(
    events: AsyncIterator[Mapping[str, Any]], job: Job
) -> AsyncIterator[Mapping[str, Any]]:
    number = 0
    try:
        async for event in events:
            yield {**event, "sequence_number": number}
            number += 1
    finally:
        job.cancel()


async def _events(
    reply: Reply, first: Event, events: AsyncIterator[Event]
) -> AsyncIterator[Mapping[str, Any]]:
    yield {"type": "response.created", "response": reply.body("in_progress")}
    yield {"type": "response.in_progress", "response": reply.body("in_progress")}
    written = _Written(reply)
    event = first
    while isinstance(event, Piece):
        for one in written.pushed(event):
            yield one
        event = await anext(events)
    assert isinstance(event, Finished)
    if (error := failure(event)) is not None:
        known = error if isinstance(error, VlmportError) else defect(error)
        fields = body_of(known)["error"]
        yield {"type": "error", **{name: fields[name] for name in ("code", "message", "param")}}
        failed = reply.body("failed")
        failed["error"] = {"code": "server_error", "message": fields["message"]}
        yield {"type": "response.failed", "response": failed}
        return
    for one in written.ended():
        yield one
    assert event.response is not None
    reply.made = len(event.response.token_ids)
    status = written.status
    yield {
        "type": f"response.{status}",
        "response": reply.body(status, [written.done_item]),
    }


class _Written:
    """The item of a stream. A text that may become a call is held back until it has."""

    def __init__(self, reply: Reply):
        self._reply, self._held, self._text = reply, "", ""
        self._logprobs: list[Any] = []
        self._begun, self._holding = False, bool(reply.started.offer)
        self._reason: str | None = None
        self.done_item: dict[str, Any] = {}

    @property
    def status(self) -> str:
        """How the answer ended."""
        return "completed" if self._reason in ("stop", "stop_string") else "incomplete"

    def pushed(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the events of a piece of the answer."""
        self._reason = piece.stop_reason or self._reason
        logprobs = self._reply.logprobs(piece.logprobs, piece.stop_reason == "stop")
        text = piece.text
        if self._holding:
            self._held += text
            if tools.may_be_call(self._held):
                self._logprobs += logprobs
                return []
            text, self._held, self._holding = self._held, "", False
            logprobs, self._logprobs = [*self._logprobs, *logprobs], []
        if not text and not logprobs:
            return []
        return [*self._beginning(), self._delta(text, logprobs)]

    def _beginning(self) -> list[dict[str, Any]]:
        if self._begun:
            return []
        self._begun = True
        part = self._reply.part("")
        return [
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": self._reply.message([], "in_progress"),
            },
            self._of_part("response.content_part.added", part=part),
        ]

    def _of_part(self, kind: str, **facts: Any) -> dict[str, Any]:
        item = {"item_id": self._reply.item_id, "output_index": 0, "content_index": 0}
        return {"type": kind, **item, **facts}

    def _delta(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        self._text += text
        self._logprobs += logprobs
        return self._of_part("response.output_text.delta", delta=text, logprobs=_of_event(logprobs))

    def ended(self) -> list[dict[str, Any]]:
        """Return the events at the end of the answer."""
        reply, events = self._reply, []
        if self._held and tools.read_call(self._held) is not None:
            return self._called()
        if self._held:
            held, self._held = self._held, ""
            logprobs, self._logprobs = self._logprobs, []
            events += [*self._beginning(), self._delta(held, logprobs)]
        events += self._beginning()
        part = reply.part(self._text, self._logprobs)
        self.done_item = reply.message([part], self.status)
        return [
            *events,
            self._of_part(
                "response.output_text.done", text=self._text, logprobs=_of_event(self._logprobs)
            ),
            self._of_part("response.content_part.done", part=part),
            {"type": "response.output_item.done", "output_index": 0, "item": self.done_item},
        ]

    def _called(self) -> list[dict[str, Any]]:
        item = self._reply.item(self._held, [], self.status)
        self.done_item = item
        place = {"item_id": item["id"], "output_index": 0}
        arguments = item["arguments"]
        kind = "response.function_call_arguments"
        return [
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": {**item, "arguments": "", "status": "in_progress"},
            },
            {"type": f"{kind}.delta", **place, "delta": arguments},
            {"type": f"{kind}.done", **place, "arguments": arguments},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
        ]
