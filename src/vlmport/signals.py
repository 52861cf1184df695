"""End a command at Ctrl-C, SIGTERM or SIGHUP by an exception, so that it cleans up.

Python handles a signal only between two of its own instructions. A graph that never ends, or a read
in a library that never returns, would never be interrupted: a thread waits for some seconds, and
then ends the process without cleaning up. The next export removes what an unfinished one left.

A signal that the parent process ignores, as under `nohup`, stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}
NAMES = {int(getattr(signal, name)): word for name, word in WORDS.items() if hasattr(signal, name)}
PATIENCE = 5.0  # seconds that a call into a library may still run after a signal
IMPATIENCE = 1.0  # the same after a second signal
HEARD = b"\0"  # written when a handler has run; no signal has this number


class _Received:
    """The state of the signal handlers of this process."""

    received: int | None = None  # the last signal, until a command has handled it
    writer: socket.socket | None = None  # to the thread that waits
    patience = PATIENCE


def exit_code(number: int) -> int:
    """Return the exit code by a shell's convention, such as 130 for SIGINT."""
    return 128 + number


def received() -> int | None:
    """Return the signal that ends this command, if any."""
    return _Received.received


def heard() -> None:
    """Note that a command has handled Ctrl-C and goes on."""
    _Received.received = None


def be_patient(seconds: float) -> None:
    """Set the time after which a signal that Python has not handled ends the process."""
    _Received.patience = seconds


def end_at_once() -> None:
    """End the process at a signal without a traceback, while nothing needs cleaning up: during
    imports, and after the command."""
    for number in NAMES:
        if _is_ours(number):
            signal.signal(number, _leave)


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C and SystemExit at the others while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Received.received, _Received.patience = None, PATIENCE
    for number in NAMES:
        if _is_ours(number):
            signal.signal(number, _raise)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _Received.writer = writer
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        end_at_once()
        signal.set_wakeup_fd(before)
        _Received.writer = None
        writer.close()
        watcher.join()
        reader.close()


@contextlib.contextmanager
def calling(handle: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the number of each signal that comes while the block runs; nothing is
    raised then. For servers, which end when their requests have."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def called(number: int, frame: FrameType | None) -> None:
        _Received.received = number
        if _Received.writer is not None:
            with contextlib.suppress(OSError):
                _Received.writer.send(HEARD)
        handle(number)

    before = {number: signal.getsignal(number) for number in NAMES}
    for number in NAMES:
        if _is_ours(number):
            signal.signal(number, called)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ours(number: int) -> bool:
    """Whether this signal has Python's or our own handler, and no other."""
    usual = (signal.SIG_DFL, signal.default_int_handler, _raise, _leave)
    return signal.getsignal(number) in usual


def _raise(number: int, frame: FrameType | None) -> None:
    _Received.received = number
    if _Received.writer is not None:
        with contextlib.suppress(OSError):
            _Received.writer.send(HEARD)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code(number))


def _leave(number: int, frame: FrameType | None = None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{NAMES[number]}\n".encode())
    os._exit(exit_code(number))


def _watch(reader: socket.socket) -> None:
    """End the process if a signal came and the interpreter did not handle it in time.

    Reads the number of each signal as it comes, and HEARD when a handler has run.
    """
    waiting: int | None = None  # a signal that is not handled yet
    while True:
        try:
            data = reader.recv(64)
        except TimeoutError:
            _leave(waiting or signal.SIGTERM)
        if not data:
            return
        seconds = _Received.patience
        for number in data:
            if number == HEARD[0]:
                waiting = None
            elif number in NAMES:
                seconds = _Received.patience if waiting is None else IMPATIENCE
                waiting = number
        reader.settimeout(None if waiting is None else seconds)
