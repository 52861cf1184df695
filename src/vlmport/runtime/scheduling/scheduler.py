"""`Scheduler`: one model for many callers, whose requests run together.

A request has the tokens that `VLM.generate` gives it alone, whatever runs with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from vlmport.errors import OptionError, ServerError
from vlmport.runtime.content_store import ContentStore
from vlmport.runtime.decoding.generate_options import GenerateOptions
from vlmport.runtime.decoding.options import GenerationOptions, whole_number
from vlmport.runtime.disk_store import MAX_BYTES as DIR_BYTES
from vlmport.runtime.disk_store import DiskStore, namespace_of
from vlmport.runtime.images.features import MAX_BYTES
from vlmport.runtime.images.memory import available_memory
from vlmport.runtime.messages import Message, check_messages
from vlmport.runtime.model import VLM
from vlmport.runtime.preparing import Preparer
from vlmport.runtime.scheduling.engine import Engine
from vlmport.runtime.scheduling.images import ImageThread
from vlmport.runtime.scheduling.job import Job, draining
from vlmport.runtime.scheduling.prefixes import PrefixCache
from vlmport.runtime.scheduling.stats import SchedulerStats
from vlmport.runtime.scheduling.task import Task

if TYPE_CHECKING:
    from vlmport.runtime.images.reading import ImageSource

MAX_RUNNING, MAX_QUEUE = 16, 64


class Scheduler:
    """Runs the requests of many callers on one model. Threads may share it.

        with Scheduler(model) as scheduler:
            job = scheduler.submit(messages, ["photo.jpg"], max_new_tokens=50)
            for event in job.events():
                ...

    Close it before the model.

    Attributes:
        model: the model that runs.
        max_running: maximum number of rows that run together.
        max_queue: maximum number of requests that wait for free rows.
    """

    def __init__(
        self,
        model: VLM,
        *,
        max_running: int = MAX_RUNNING,
        max_queue: int = MAX_QUEUE,
        running_bytes: int | None = None,
        cache_bytes: int = MAX_BYTES,
        cache_dir: str | Path | None = None,
        cache_dir_bytes: int = DIR_BYTES,
    ):
        """Start the threads.

        Args:
            model: an open model. It may answer other callers at the same time.
            max_running: maximum number of rows that run together (default 16). A request takes one
                row, or one for each beam or sequence.
            max_queue: maximum number of requests that wait for free rows (default 64).
            running_bytes: maximum size in bytes of the rows that run together, each with room for
                its whole answer; a request that fits alone only runs alone. None for half of the
                memory that is free now, or no limit where the system does not tell.
            cache_bytes: maximum size in bytes of the image features and the prompts' rows that are
                kept in memory (default 256 MB, 0 = none). An image in it is not encoded again, and
                a prompt that begins like an earlier one is not run again as far as that goes.
            cache_dir: a folder where they are kept too, for the next start; None for none.
            cache_dir_bytes: maximum size in bytes of that folder (default 4 GB).

        Raises:
            OptionError: a number is out of its range.
        """
        self.model = model
        self.max_running = whole_number("max_running", max_running, 1)
        self.max_queue = whole_number("max_queue", max_queue, 0)
        components = model.components
        size = whole_number("cache_bytes", cache_bytes, 0)
        on_disk = whole_number("cache_dir_bytes", cache_dir_bytes, 0)
        disk = None
        if cache_dir is not None:
            disk = DiskStore(Path(cache_dir), namespace_of(components), on_disk)
        self._store = ContentStore(size, disk)
        self._preparer = Preparer(components, store=self._store)
        prefixes = PrefixCache(components, self._store)
        if running_bytes is None:
            running_bytes = None if (free := available_memory()) is None else free // 2
        else:
            running_bytes = whole_number("running_bytes", running_bytes, 0)
        self._engine = Engine(components, self._preparer, prefixes, self.max_running, running_bytes)
        self._images = ImageThread(self._preparer, self._ready)
        self._draining = False

    def submit(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource] = (),
        *,
        image_options: Mapping[str, Any] | None = None,
        time_limit: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Job:
        """Check a request and put it into the queue; it begins when rows are free.

        Messages and options are checked here. Images are read by another thread: their errors, and
        those of a prompt that is too long with them, come from the job, before its first piece.

        Args:
            messages: as `VLM.generate` takes them.
            images: as `VLM.generate` takes them. Open files must stay open until the job started.
            image_options: options of the image processor, over the bundle's `image_options`.
            time_limit: maximum number of seconds until the end of the answer, the time in the queue
                included. After it the job ends with the answer so far.
            **options: how tokens are chosen, see GenerationOptions; over the bundle's defaults.

        Returns:
            The job.

        Raises:
            PromptError: a message is malformed, images and placeholders differ in number, or a
                prompt without images does not fit into the context.
            OptionError: an option is unknown, out of its range, or contradicts another.
            ImageError: an image part holds base64 that can't be read.
            ServerError: the queue is full ('server.queue-full', with `retry_after`), or the
                scheduler is closed ('server.draining').
        """
        if self._draining:
            raise draining()
        decoding = self._preparer.decoding(options)
        rows = self._rows(decoding.options)
        if image_options:
            self.model.components.check_image_options(image_options)
        chat = check_messages(messages, images, self.model.components.manifest.image_options)
        text = self._preparer.text_ids(chat.messages)
        sources = [
            (image, {**(image_options or {}), **own})
            for image, own in zip(chat.images, chat.options, strict=True)
        ]
        tokens = 0
        if not sources:
            ids, new = self._preparer.prompt(text, (), decoding)
            tokens = len(ids) + new
        job = Job(self._engine.wake, _seconds(time_limit))
        task = Task(job, decoding, text, sources, None if sources else (), rows, tokens)
        with self._engine.lock:
            if self._draining:
                raise draining()
            self._refuse_if_full(rows)
            self._engine.waiting.append(task)
            self._engine.counters.submitted += 1
            self._engine.lock.notify_all()
        if sources:
            self._images.put(task)
        return job

    def _rows(self, options: GenerationOptions) -> int:
        """Return the number of rows of a request. Raises OptionError for more than can run."""
        rows = max(options.num_beams, options.num_return_sequences)
        if rows > self.max_running:
            name = "num_beams" if options.num_beams > 1 else "num_return_sequences"
            raise OptionError(
                f"{name}={rows}, the limit here is {self.max_running}",
                hint=f"use at most {self.max_running}",
                code="option.wrong-value",
            )
        return rows

    def _refuse_if_full(self, rows: int) -> None:
        """Raise ServerError where too many requests wait; needs the engine's lock."""
        engine = self._engine
        free, queued = self.max_running - engine.rows, 0
        for needed in (*(task.rows for task in engine.waiting), rows):
            free -= needed
            queued += free < 0
        if queued <= self.max_queue:
            return
        engine.counters.refused += 1
        done = engine.counters.ended["finished"]
        each = engine.counters.seconds / done if done else 1.0
        running = max(1, len(engine.running) + len(engine.prefilling))
        raise ServerError(
            f"the queue is full: the maximum is {self.max_queue}",
            hint="try again later",
            code="server.queue-full",
            retry_after=max(1.0, each * queued / running),
        )

    def _ready(self, task: Task, error: Exception | None) -> None:
        """Let a task run whose images are encoded, or end it."""
        if error is not None:
            self._engine.fail_waiting(task, error)
        self._engine.wake()

    def stats(self) -> SchedulerStats:
        """Return the state and the counters."""
        engine, features = self._engine, self._preparer.features
        with engine.lock:
            counters = engine.counters
            return SchedulerStats(
                waiting=len(engine.waiting),
                prefilling=len(engine.prefilling),
                running=len(engine.running),
                running_rows=engine.rows,
                max_rows=counters.max_rows,
                submitted=counters.submitted,
                refused=counters.refused,
                ended=dict(counters.ended),
                prompt_tokens=counters.prompt_tokens,
                cached_tokens=counters.cached_tokens,
                prefill_tokens=counters.prefill_tokens,
                decode_tokens=counters.decode_tokens,
                steps=counters.steps,
                images=counters.images,
                images_encoded=features.misses,
                cache_bytes=self._store.nbytes,
                running_bytes=engine.running_bytes,
            )

    def close(self, grace: float = 0) -> None:
        """Take no more requests, let those that were accepted end, and stop the threads.

        Args:
            grace: seconds after which jobs that are not done are cut: they end with the answer so
                far and the reason 'shutdown' (default 0).
        """
        with self._engine.lock:
            self._draining = True
        self._engine.close(time.monotonic() + grace)
        self._images.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _seconds(limit: float | None) -> float | None:
    if limit is not None and not (isinstance(limit, int | float) and 0 < limit < float("inf")):
        raise OptionError(
            f"time_limit={limit!r}, expected a number of seconds above 0",
            hint="leave it out for no limit",
            code="option.wrong-value",
        )
    return limit
