"""Processes under test: each ends with the block that started it, whatever happens there."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with its output in pipes, as text; killed if it still runs when the block ends."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    process = subprocess.Popen(list(map(str, command)), text=True, **pipes | options)
    try:
        yield process
    finally:
        process.kill()  # nothing where it has ended
        with process:  # closes the pipes and waits
            pass


def let_children_be_interrupted() -> None:
    """Have signals do what they usually do in processes that are started from here.

    A child inherits that a signal is ignored, as it is for jobs in the background of a script; it
    does not inherit a handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
