"""A bound on time and memory for what handles bad input."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

SECONDS, BYTES = 30, 3 << 30
WAIT = 10  # times as long by the clock: other programs may have the processor


class HangError(BaseException):
    """Too slow. No Exception, so that no reader takes it for one of its own."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = BYTES) -> Iterator[None]:
    """Raise HangError past so many seconds of work, MemoryError past so many more bytes of
    addresses."""

    def hang(number: int, frame: FrameType | None) -> NoReturn:
        raise HangError(f"more than {seconds} s of work, or {WAIT} times as long by the clock")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, WAIT * seconds),
    }
    handlers = {number: signal.signal(number, hang) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    if (used := _addresses()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _addresses() -> int | None:
    """Bytes of address space in use; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()
