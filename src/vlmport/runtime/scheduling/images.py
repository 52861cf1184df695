"""The thread that reads and encodes images, while the engine's thread writes tokens.

It is one thread, so an image that several waiting requests have is encoded once: the second request
finds it in the cache. The decoder and the vision encoder run at the same time, each with the
threads of its own session.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from vlmport.runtime.preparing import Preparer
from vlmport.runtime.scheduling.task import Task


class ImageThread:
    """Prepares the images of tasks, in the order in which they are put in."""

    def __init__(self, preparer: Preparer, ready: Callable[[Task, Exception | None], None]):
        """Args:
        ready: called with each task whose images are encoded, or with the error of its images.
        """
        self._preparer, self._ready = preparer, ready
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vlmport-images", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        self._tasks.put(task)

    def close(self) -> None:
        """End the thread after the image that it works on."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            error = None
            try:
                self._encode(task)
            except Exception as caught:  # the request gets it, and the thread goes on
                error = caught
            self._ready(task, error)
            del task  # so that no pixels wait for the next request

    def _encode(self, task: Task) -> None:
        start = time.perf_counter()
        processed = []
        for source, options in task.sources:
            if task.job.ends_now(time.monotonic()) or task.job.finished:
                return
            processed.append(self._preparer.image(source, options))
        # Before anything is encoded: a prompt that is too long is refused here.
        ids, new = self._preparer.prompt(task.text, processed, task.decoding)
        encoded = []
        for image in processed:
            if task.job.ends_now(time.monotonic()) or task.job.finished:
                return
            encoded.append(self._preparer.features.encoded(image))
        task.image_seconds = time.perf_counter() - start
        task.tokens = len(ids) + new
        task.images, task.sources = tuple(encoded), ()
