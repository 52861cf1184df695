"""`Job`: one request in a scheduler, and the events that its answer comes in.

Traps:
- Callbacks run in the scheduler's threads, under the job's lock: they must return at once.
- A callback that raises belongs to a reader that is gone, such as a closed event loop: the job is
  cancelled.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from vlmport.errors import ServerError
from vlmport.runtime.decoding.search import StopReason, TokenLogprob
from vlmport.runtime.response import Response

Reason = Literal["finished", "cancelled", "time-limit", "shutdown", "failed"]
"""Why a job ended: its answer is complete (by a stop token, a stop string or max_new_tokens), its
caller cancelled it, its time limit passed, the scheduler was closed, or an error ended it."""


@dataclass(frozen=True)
class Piece:
    """The next piece of one sequence of an answer.

    Attributes:
        sequence: number of the sequence, from 0 on; below num_return_sequences.
        text: text that is certain; '' where tokens have no text of their own. All texts of a
            sequence together are the text of its answer.
        token_ids: the tokens since the last piece of this sequence.
        logprobs: one entry for each of these tokens; None where they were not asked for.
        stop_reason: set in the last piece of a sequence that ended by itself.
        at: `time.monotonic()` when the last of these tokens was chosen.
    """

    sequence: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    stop_reason: StopReason | None
    at: float


@dataclass(frozen=True)
class Finished:
    """The last event of a job.

    Attributes:
        reason: why the job ended.
        response: the answer so far, with its alternatives; None where there is no token, or after
            an error.
        error: what `Job.result` raises; None where it returns the response.
    """

    reason: Reason
    response: Response | None = None
    error: Exception | None = None


Event = Piece | Finished


@dataclass
class Times:
    """When a job got how far, by `time.monotonic()`; None for what did not happen.

    Attributes:
        queued: when it was submitted.
        started: when its prompt began to run.
        first_token: when its first token was chosen.
        last_token: when its newest token was chosen.
        ended: when its last event came.
    """

    queued: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None


class Job:
    """One request. `Scheduler.submit` makes it.

        for event in job.events():
            if isinstance(event, Piece):
                print(event.text, end="")
        response = job.result()

    Threads may share it.

    Attributes:
        times: when it got how far.
        prompt_tokens: number of tokens of the prompt, image tokens included; 0 until it is known.
        cached_tokens: how many of them were not prefilled again.
        image_tokens: how many of them are image tokens.
    """

    def __init__(self, wake: Callable[[], None], time_limit: float | None = None):
        """Args:
        wake: called after `cancel`, so that the scheduler looks at the job.
        time_limit: maximum number of seconds from now to the end of the answer.
        """
        self.times = Times(time.monotonic())
        self.deadline = None if time_limit is None else self.times.queued + time_limit
        self.prompt_tokens = self.cached_tokens = self.image_tokens = 0
        self._wake = wake
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._callbacks: list[Callable[[Event], object]] = []
        self._cancelled = False

    @property
    def finished(self) -> bool:
        """Whether the last event has come."""
        return self.ended is not None

    @property
    def ended(self) -> Finished | None:
        """The last event, once it has come."""
        last = self._events[-1] if self._events else None
        return last if isinstance(last, Finished) else None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called before the last event; `reason` says how the job ended."""
        return self._cancelled

    @property
    def reason(self) -> Reason | None:
        """Why the job ended; None before."""
        return None if (ended := self.ended) is None else ended.reason

    def cancel(self) -> None:
        """End the job: its rows are free at the next step. Does nothing after the last event."""
        with self._changed:
            if self.finished:
                return
            self._cancelled = True
        self._wake()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield all events from the first on, and wait for those that are not there yet.

        Several readers get the same events. The last one is a `Finished`; nothing is raised for a
        job that failed.

        Args:
            timeout: maximum number of seconds to wait for one event; TimeoutError after it.
        """
        at = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda at=at: len(self._events) > at, timeout):
                    raise TimeoutError(f"no event of the job for {timeout} s")
                fresh = self._events[at:]
            at += len(fresh)
            yield from fresh
            if isinstance(fresh[-1], Finished):
                return

    async def stream(self) -> AsyncGenerator[Event, None]:
        """Yield all events as `events` does, for asyncio: waiting blocks no other task.

        The job goes on when the iterator is closed; call `cancel` to end it.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        remove = self.on_event(lambda event: loop.call_soon_threadsafe(queue.put_nowait, event))
        try:
            while True:
                event = await queue.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            remove()

    def on_event(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call a function with each event from the first on, the past ones at once.

        Later events come from the scheduler's threads. The function must return at once and must
        not call the job; one that raises cancels the job.

        Returns:
            A function that ends the calls.
        """
        with self._changed:
            for event in self._events:
                callback(event)
            self._callbacks.append(callback)

        def remove() -> None:
            with self._changed:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return remove

    def result(self, timeout: float | None = None) -> Response:
        """Wait for the end, and return the answer.

        A job that its time limit or the shutdown ended has the answer so far, which is not
        `complete`.

        Args:
            timeout: maximum number of seconds to wait; TimeoutError after it.

        Raises:
            ImageError, PromptError, OptionError, DeviceError: as `VLM.generate` does.
            ServerError: the job was cancelled, or was ended before its first token.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"the job did not end in {timeout} s")
        ended = self.ended
        assert ended is not None
        if ended.error is not None:
            raise ended.error
        assert ended.response is not None
        return ended.response

    def ends_now(self, now: float) -> Reason | None:
        """Whether the scheduler has to end the job now, and why."""
        if self._cancelled:
            return "cancelled"
        return "time-limit" if self.deadline is not None and now >= self.deadline else None

    def emit(self, event: Event) -> None:
        """Give an event to all readers; the scheduler calls this."""
        with self._changed:
            if self.finished:
                return
            if isinstance(event, Finished):
                self.times.ended = time.monotonic()
            self._events.append(event)
            for callback in tuple(self._callbacks):
                try:
                    callback(event)
                except Exception:  # its reader is gone
                    self._callbacks.remove(callback)
                    self._cancelled = True
            self._changed.notify_all()


def ended_early(reason: Reason, response: Response | None) -> Finished:
    """Make the last event of a job that was ended before its answer was complete."""
    if reason == "cancelled":
        error = ServerError(
            "the request was cancelled", hint="send it again", code="server.cancelled"
        )
        return Finished(reason, response, error)
    if response is not None:
        return Finished(reason, response)
    if reason == "time-limit":
        error = ServerError(
            "the time limit passed before the first token",
            hint="try again when fewer requests wait, or raise the time limit",
            code="server.time-limit",
        )
        return Finished(reason, None, error)
    return Finished(reason, None, draining())


def draining() -> ServerError:
    """Make the error for requests that a scheduler which is being closed does not run."""
    return ServerError(
        "the server is shutting down",
        hint="send the request to another server, or again after the restart",
        code="server.draining",
    )
