"""POST /v1/chat/completions: run a request, and write its answer whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from vlmport.errors import VlmportError
from vlmport.runtime.response import Answer, Response
from vlmport.runtime.scheduling import Event, Finished, Job, Piece
from vlmport.serve import tools
from vlmport.serve.api_errors import body_of, defect
from vlmport.serve.chat_messages import prompt_of
from vlmport.serve.chat_options import (
    RENAMED,
    generation_options,
    named_as_fields,
    other_characters,
)
from vlmport.serve.models import OpenModel
from vlmport.serve.schemas import ChatRequest
from vlmport.serve.service import Service, new_id
from vlmport.serve.token_texts import logprobs_of
from vlmport.serve.waiting import failure, first_event, responses, while_there

FINISH = {"stop": "stop", "stop_string": "stop", "length": "length", None: "length"}
DONE = "[DONE]"


@dataclass(frozen=True)
class Started:
    """A chat request whose job runs.

    Attributes:
        options: those of `VLM.generate`.
        renamed: option → field of the request, for errors.
        copies: how many choices each sequence of the job is; more than 1 where the most likely
            tokens are taken, so that all choices are the same.
    """

    body: ChatRequest
    model: OpenModel
    job: Job
    offer: tools.Offer
    options: Mapping[str, Any]
    renamed: Mapping[str, str]
    copies: int
    id: str
    created: int

    @property
    def head(self) -> dict[str, Any]:
        """What every body of the answer begins with."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "service_tier": None,
        }


async def start(
    body: ChatRequest, service: Service, renamed: Mapping[str, str] = RENAMED
) -> Started:
    """Check a request and submit its job. Raises errors of ours.

    Args:
        renamed: option of `VLM.generate` → field of the request, for errors.
    """
    async with service.models.lease(body.model) as model:
        offer = tools.offer_of(body.tools, body.tool_choice)
        context = model.vlm.components.manifest.dims.context_length
        options = generation_options(body, model.defaults, service.settings, context)
        if offer:
            tools.refuse_regex(body.regex)
            schema = options.pop("json_schema", None)
            options["lark_grammar"] = tools.grammar_of(offer, schema)
        prompt = await prompt_of(
            body.messages,
            offer,
            other_characters=other_characters(body),
            image_options=model.image_options,
            settings=service.settings,
            fetcher=service.fetcher,
        )
        with named_as_fields(body, options, renamed):
            job = await model.submit(
                prompt.messages, prompt.images, image_options=body.image_options, **options
            )
    copies = 1 if "num_return_sequences" in options else body.n or 1
    return Started(
        body, model, job, offer, options, renamed, copies, new_id("chatcmpl"), int(time.time())
    )


async def whole_answer(started: Started, request: Request) -> Response:
    """Wait for the answer. Raises the error that ended the job."""
    (found,) = await responses([started.job], request)
    if isinstance(found, VlmportError):
        with named_as_fields(started.body, started.options, started.renamed):
            raise found
    return found


async def complete(started: Started, request: Request) -> dict[str, Any]:
    """Wait for the answer, and write the body of a `chat.completion`."""
    response = await whole_answer(started, request)
    answers: list[Answer] = [response, *response.alternatives] * started.copies
    return {
        "object": "chat.completion",
        **started.head,
        "choices": [_choice(started, index, one) for index, one in enumerate(answers)],
        "usage": usage_of(started.job, response.counts, answers[: len(answers) // started.copies]),
    }


def _choice(started: Started, index: int, answer: Answer) -> dict[str, Any]:
    call = tools.read_call(answer.text) if started.offer else None
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text if call is None else None,
        "refusal": None,
        "annotations": [],
    }
    if call is not None:
        message["tool_calls"] = [_tool_call(call)]
    tokenizer = started.model.vlm.prompter.tokenizer
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs_of(tokenizer, answer.logprobs, answer.stop_reason == "stop"),
        "finish_reason": FINISH[answer.stop_reason] if call is None else "tool_calls",
    }


def _tool_call(call: tools.Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_id("call"), "type": "function", "function": function}


def usage_of(job: Job, counts: Mapping[str, int], answers: Sequence[Answer]) -> dict[str, Any]:
    """Count the tokens of a request."""
    return usage(
        job.prompt_tokens or counts["prompt_tokens"],
        sum(len(one.token_ids) for one in answers),
        job.cached_tokens,
        job.image_tokens,
    )


def usage(prompt: int, made: int, cached: int, image: int) -> dict[str, Any]:
    """Write counts of tokens as OpenAI does; image tokens are of the prompt, as cached ones are."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "image_tokens": image,
            "audio_tokens": 0,
            "cache_write_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def open_stream(started: Started, request: Request) -> AsyncIterator[Mapping[str, Any] | str]:
    """Return the chunks of a stream, once the first event is there."""
    return _chunks(started, *await first_of(started, request))


async def first_of(started: Started, request: Request) -> tuple[Event, AsyncIterator[Event]]:
    """Wait for the first event of a job, and return it with the further ones.

    Raises the error of a job that ended before its first piece, so that it has its own status.
    """
    events = started.job.stream()
    try:
        with named_as_fields(started.body, started.options, started.renamed):
            async with while_there(request):
                return await first_event(events), events
    except BaseException:
        started.job.cancel()
        raise


async def _chunks(
    started: Started, first: Event, events: AsyncIterator[Event]
) -> AsyncIterator[Mapping[str, Any] | str]:
    """Write the chunks of a stream. Closing it, which the server does for a client that leaves,
    ends the job."""
    choices: dict[int, _StreamedChoice] = {}
    made = 0
    try:
        for chunk in _opening(started, choices):
            yield chunk
        event: Event | None = first
        while isinstance(event, Piece):
            made += len(event.token_ids)
            for index in _indices(started, event.sequence):
                for delta in choices[index].pushed(event):
                    yield _chunk(started, index, delta)
            event = await anext(events)
        assert isinstance(event, Finished)
        if (error := failure(event)) is not None:
            yield body_of(error if isinstance(error, VlmportError) else defect(error))
        else:
            for index, choice in choices.items():
                for delta in choice.ended():
                    yield _chunk(started, index, delta)
            if started.body.stream_options and started.body.stream_options.include_usage:
                job = started.job
                counts = usage(job.prompt_tokens, made, job.cached_tokens, job.image_tokens)
                yield {**_chunk_head(started), "choices": [], "usage": counts}
        yield DONE
    finally:
        started.job.cancel()


def _indices(started: Started, sequence: int) -> range:
    """The choices that a sequence of the job is."""
    return range(sequence * started.copies, (sequence + 1) * started.copies)


def _opening(started: Started, choices: dict[int, _StreamedChoice]) -> list[dict[str, Any]]:
    chunks = []
    for index in range(started.body.n or 1):
        choices[index] = _StreamedChoice(started)
        delta = {"role": "assistant", "content": "", "refusal": None}
        chunks.append(_chunk(started, index, {"delta": delta}))
    return chunks


def _chunk_head(started: Started) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", **started.head}


def _chunk(started: Started, index: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    chunk = {
        **_chunk_head(started),
        "choices": [{"index": index, "logprobs": None, "finish_reason": None, **choice}],
    }
    if started.body.stream_options and started.body.stream_options.include_usage:
        chunk["usage"] = None
    return chunk


class _StreamedChoice:
    """One choice of a stream. A text that may become a tool call is held back until it has."""

    def __init__(self, started: Started):
        self._started, self._held, self._reason = started, "", None
        self._holding = bool(started.offer)

    def pushed(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what a piece of the answer adds to the stream."""
        self._reason = piece.stop_reason or self._reason
        text = piece.text
        if self._holding:
            self._held += text
            if tools.may_be_call(self._held):
                text = ""
            else:
                text, self._held, self._holding = self._held, "", False
        tokenizer = self._started.model.vlm.prompter.tokenizer
        logprobs = logprobs_of(tokenizer, piece.logprobs, piece.stop_reason == "stop")
        if not text and not (logprobs and logprobs["content"]):
            return []
        return [{"delta": {"content": text}, "logprobs": logprobs}]

    def ended(self) -> list[dict[str, Any]]:
        """Return the end of the choice: what was held back, and why it ended."""
        call = tools.read_call(self._held)
        if call is not None:
            calls = [{"index": 0, **_tool_call(call)}]
            return [
                {"delta": {"tool_calls": calls}},
                {"delta": {}, "finish_reason": "tool_calls"},
            ]
        rest = [{"delta": {"content": self._held}}] if self._held else []
        return [*rest, {"delta": {}, "finish_reason": FINISH[self._reason]}]
