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


class HangError(BaseException):
    """Too slow. No Exception, so that no reader takes it for one of its own."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = BYTES) -> Iterator[None]:
    """Raise HangError past so many seconds, MemoryError past so many more bytes of addresses."""

    def hang(number: int, frame: FrameType | None) -> NoReturn:
        raise HangError(f"more than {seconds} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if (used := _addresses()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _addresses() -> int | None:
    """Bytes of address space in use; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()
