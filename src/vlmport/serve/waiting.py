"""Wait for jobs on behalf of a client that may leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from starlette.requests import Request

from vlmport.errors import ServerError, VlmportError
from vlmport.runtime.response import Response
from vlmport.runtime.scheduling import Event, Finished, Job


class ClientGoneError(Exception):
    """The client closed its connection before its answer was complete."""


def failure(ended: Finished) -> Exception | None:
    """Return the error of a job that did not end by itself.

    One that its time limit ended has no error where it has an answer so far: that is cut as
    max_tokens cuts it. Nothing would be gained by the same request again.
    """
    if ended.error is not None:
        return ended.error
    if ended.reason == "shutdown":
        return ServerError(
            "the server was shut down before the answer was complete",
            hint="send the request again",
            code="server.draining",
        )
    return None


async def responses(jobs: Sequence[Job], request: Request) -> list[Response | VlmportError]:
    """Wait for jobs; each gives its response, or the error of ours that ended it.

    Raises ClientGoneError, after the jobs were cancelled, where the client leaves before.
    """
    try:
        async with while_there(request):
            return [await _response(job) for job in jobs]
    finally:
        for job in jobs:
            job.cancel()  # does nothing where it has ended


async def _response(job: Job) -> Response | VlmportError:
    async for event in job.stream():
        if isinstance(event, Finished):
            error = failure(event)
            if isinstance(error, VlmportError):
                return error
            if error is not None:
                raise error
            assert event.response is not None
            return event.response
    raise AssertionError("a job without a last event")


@contextlib.asynccontextmanager
async def while_there(request: Request) -> AsyncIterator[None]:
    """End the block with ClientGoneError where the client leaves. The body must have been read."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    watcher = asyncio.create_task(_when_gone(request.receive, leave))
    try:
        yield
    except asyncio.CancelledError:
        if gone:
            task.uncancel()
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()


async def _when_gone(receive: Callable[[], Awaitable], leave: Callable[[], None]) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            leave()
            return


async def first_event(events: AsyncIterator[Event]) -> Event:
    """Return the first event of a job. Raises the error that ended the job before any piece."""
    event = await anext(events)
    if isinstance(event, Finished) and (error := failure(event)) is not None:
        raise error
    return event
