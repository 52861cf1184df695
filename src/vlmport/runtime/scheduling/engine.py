"""The thread that owns the decoder: which requests run, and one step after the other.

One round of the loop ends jobs that are cancelled or late, lets waiting jobs begin while there are
free rows, runs one chunk of waiting prompts, and runs one step of all rows that write. So a long
prompt holds up the others by one chunk at a time.

Traps:
- The lists of jobs change under the lock; the decoder runs outside of it.
- An error of the decoder's session ends all running jobs, because their rows may be half written.
  An error of one job's search ends that job alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import CHUNK
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.preparing import Preparer
from vlmport.runtime.scheduling.job import Job, Reason
from vlmport.runtime.scheduling.prefill import Prefill
from vlmport.runtime.scheduling.prefixes import PrefixCache
from vlmport.runtime.scheduling.task import Task

# Tokens of a prompt that run between two steps of rows that write, where a decoder takes chunks of
# any size. They take about as long as two steps of 16 rows of SmolVLM-256M at q4.
BESIDE = 64


@dataclass
class Counters:
    """What the engine counts, see SchedulerStats."""

    submitted: int = 0
    refused: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    max_rows: int = 0
    images: int = 0
    seconds: float = 0.0  # of finished jobs, from the start of the prompt to the end


class Engine:
    """Runs tasks on one thread.

    Attributes:
        lock: guards the lists below and the counters; notified when one of them changes.
        waiting: tasks whose prompt has not begun to run, in the order of their arrival.
        prefilling: tasks that have rows and whose prompt runs, in order; the first one runs, and
            the others have no Prefill yet.
        running: tasks that write tokens.
    """

    def __init__(
        self,
        components: Components,
        preparer: Preparer,
        prefixes: PrefixCache,
        max_running: int,
        max_bytes: int | None,
    ):
        self.components, self.preparer, self.prefixes = components, preparer, prefixes
        self.max_running, self.max_bytes = max_running, max_bytes
        self.lock = threading.Condition()
        self.waiting: list[Task] = []
        self.prefilling: dict[Task, Prefill | None] = {}
        self.running: list[Task] = []
        self.counters = Counters()
        self.stop_at: float | None = None  # when jobs are cut, once the scheduler is closed
        self._generation: Generation | None = None
        self._thread = threading.Thread(target=self._loop, name="vlmport-engine", daemon=True)
        self._thread.start()

    def close(self, stop_at: float) -> None:
        """Run what is there until `stop_at`, by time.monotonic(), cut the rest, and wait."""
        with self.lock:
            self.stop_at = stop_at if self.stop_at is None else min(stop_at, self.stop_at)
            self.lock.notify_all()
        self._thread.join()

    def wake(self) -> None:
        """Make the thread look at the jobs."""
        with self.lock:
            self.lock.notify_all()

    @property
    def rows(self) -> int:
        """Number of rows that prefilling and running tasks take; needs the lock."""
        return sum(task.rows for task in (*self.prefilling, *self.running))

    @property
    def running_bytes(self) -> int:
        """Size of the buffers of running rows."""
        generation = self._generation
        return 0 if generation is None else generation.cache.nbytes

    def _loop(self) -> None:
        while True:
            with self.lock:
                if self.stop_at is not None and not self._tasks():
                    return
                if not self._can_work():
                    if not self._tasks():
                        self._generation = None  # idle: gives the memory back
                    self.lock.wait(self._patience())
            try:
                self._round()
            except Exception as error:
                self._fail_all(error)

    def _round(self) -> None:
        self._end_some()
        self._begin_some()
        self._prefill_some()
        if self.running:
            self._step()

    def _tasks(self) -> list[Task]:
        return [*self.waiting, *self.prefilling, *self.running]

    def _can_work(self) -> bool:
        now = time.monotonic()
        return (
            bool(self.prefilling or self.running)
            or self._next_waiting() is not None
            or any(self._reason(task.job, now) for task in self.waiting)
        )

    def _patience(self) -> float | None:
        """Return the seconds until the next job in the queue is late; None for ever."""
        times = [task.job.deadline for task in self.waiting if task.job.deadline is not None]
        times += [] if self.stop_at is None else [self.stop_at]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _reason(self, job: Job, now: float) -> Reason | None:
        if (reason := job.ends_now(now)) is not None:
            return reason
        return "shutdown" if self.stop_at is not None and now >= self.stop_at else None

    def _end_some(self) -> None:
        """End the jobs that are cancelled or late, and take them off the lists."""
        now = time.monotonic()
        with self.lock:
            ended: list[tuple[Task, Reason | None]]
            ended = [(task, self._reason(task.job, now)) for task in self._tasks()]
        for task, reason in ended:
            if reason is not None:
                self._end(task, reason)

    def _end(self, task: Task, reason: Reason) -> None:
        if task.prepared is not None:
            task.request.cancel()  # the next step frees its rows
        task.finish(self.preparer, reason)
        self._remove(task, reason)

    def _fail(self, task: Task, error: Exception) -> None:
        if task.prepared is not None:
            task.request.cancel()
        task.fail(error)
        self._remove(task, "failed")

    def fail_waiting(self, task: Task, error: Exception) -> None:
        """End a waiting job whose images have an error."""
        task.fail(error)
        self._remove(task, "failed")

    def _remove(self, task: Task, reason: Reason) -> None:
        """Take a task off its list, and count it."""
        with self.lock:
            if task in self.waiting:
                self.waiting.remove(task)
            elif task in self.running:
                self.running.remove(task)
            elif task in self.prefilling:
                del self.prefilling[task]
            else:
                return  # the other thread was first
            self.counters.ended[reason] += 1
            started = task.job.times.started
            if reason == "finished" and started is not None:
                self.counters.seconds += time.monotonic() - started
            self.lock.notify_all()

    def _next_waiting(self) -> Task | None:
        """Return the first task that could begin now; needs the lock.

        A task with images that are not encoded yet lets later ones pass; one that needs more rows
        or memory than are free does not, or it would wait for ever.
        """
        ready = next((task for task in self.waiting if task.images is not None), None)
        if ready is None or self.rows + ready.rows > self.max_running:
            return None
        active = [*self.prefilling, *self.running]
        if not active or self.max_bytes is None:
            return ready
        needed = sum(task.rows * task.tokens for task in (*active, ready))
        return ready if needed * self.components.decoder.token_bytes <= self.max_bytes else None

    def _begin_some(self) -> None:
        """Give free rows to the tasks that wait for them."""
        with self.lock:
            while (task := self._next_waiting()) is not None:
                self.waiting.remove(task)
                self.prefilling[task] = None
                self.counters.max_rows = max(self.counters.max_rows, self.rows)

    def _begin(self, task: Task) -> Prefill:
        """Make the request of a task, which reuses what an earlier prompt has left."""
        assert task.images is not None
        task.job.times.started = time.monotonic()
        began = time.perf_counter() - task.image_seconds
        reusable = self.prefixes.find(*self.preparer.prompt_rows(task.text, task.images))
        task.prepared = self.preparer.assemble(
            task.text, task.images, task.decoding, began, reusable
        )
        prepared, job = task.prepared, task.job
        prefill = Prefill(self.components, prepared.request)
        job.prompt_tokens, job.image_tokens = len(prepared.ids), len(prepared.image_rows)
        job.cached_tokens = len(prepared.ids) - len(prepared.request.embeds)
        with self.lock:
            self.prefilling[task] = prefill
            self.counters.prompt_tokens += job.prompt_tokens
            self.counters.cached_tokens += job.cached_tokens
            self.counters.images += len(task.images)
        return prefill

    def _prefill_some(self) -> None:
        """Run one chunk of the first prompt, and of further ones as far as that is one chunk."""
        limit, tokens = BESIDE if self.running else CHUNK, 0
        while self.prefilling:
            task, prefill = next(iter(self.prefilling.items()))
            start = time.perf_counter()
            try:
                prefill = prefill or self._begin(task)
                if tokens and tokens + prefill.next_size(limit) > limit:
                    return
                tokens += self._advance(task, prefill, limit)
                task.prefill_seconds += time.perf_counter() - start
                if prefill.done:
                    self._join(task, prefill)
            except Exception as error:
                self._fail(task, error)
                return

    def _advance(self, task: Task, prefill: Prefill, limit: int) -> int:
        """Run one chunk of a task's prompt, and return its number of tokens."""
        tokens = prefill.advance(limit)
        with self.lock:
            self.counters.prefill_tokens += tokens
        if prefill.done:
            prepared = task.prepared
            assert prepared is not None
            self.prefixes.keep(prepared.ids, prepared.image_rows, prefill.row)
        return tokens

    def _join(self, task: Task, prefill: Prefill) -> None:
        """Let a task write whose prompt ran and whose first token is chosen."""
        if not task.request.done:
            self._generation = self._generation or Generation(self.components, isolate=True)
            self._generation.join(task.request, prefill.row)
        with self.lock:
            del self.prefilling[task]
            self.running.append(task)
        self._deliver(task)

    def _step(self) -> None:
        """Run one step of all rows, and give each job its tokens."""
        generation = self._generation
        assert generation is not None
        advanced = set(generation.step())
        with self.lock:
            self.counters.steps += 1
        for task in tuple(self.running):
            if (error := generation.failed.pop(task.request, None)) is not None:
                self._fail(task, error)
            elif task.request in advanced:
                self._deliver(task)

    def _deliver(self, task: Task) -> None:
        new = task.advance(self.preparer)
        with self.lock:
            self.counters.decode_tokens += new
        if task.request.search.done:
            task.finish(self.preparer, "finished")
            self._remove(task, "finished")

    def _fail_all(self, error: Exception) -> None:
        """End all jobs whose rows may be half written, and begin with an empty cache."""
        self._generation = None
        for task in [*self.prefilling, *self.running]:
            self._fail(task, error)
