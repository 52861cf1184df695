"""Ctrl-C, SIGTERM and SIGHUP end a command by an exception, so that all it began is cleaned up.

Python hears a signal between two of its own instructions only. A graph that never ends, or a read
in a library that never returns, would never be interrupted: a thread waits for some seconds, and
then ends the process as it is. The next export removes what an unfinished one left.

A signal that the parent process ignores, as `nohup` does, stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}
NAMES = {int(getattr(signal, name)): word for name, word in WORDS.items() if hasattr(signal, name)}
PATIENCE = 5.0  # seconds that a call into a library may still take
IMPATIENCE = 1.0  # after the second signal
HEARD = b"\0"  # no signal has this number


class _State:
    """What the handlers of this process have seen."""

    received: int | None = None  # the last signal, until a command has dealt with it
    writer: socket.socket | None = None  # to the thread that waits
    patience = PATIENCE


def exit_code(number: int) -> int:
    """The exit code by a shell's convention: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


def received() -> int | None:
    """The signal that this command ends by, if any."""
    return _State.received


def heard() -> None:
    """Note that a command has dealt with Ctrl-C and goes on."""
    _State.received = None


def be_patient(seconds: float) -> None:
    """Wait this long before a signal that is not heard ends the process."""
    _State.patience = seconds


def end_at_once() -> None:
    """End the process without a word of Python at a signal, while nothing needs to be cleaned up:
    during imports, and when all is done."""
    for number in NAMES:
        if _is_ours(number):
            signal.signal(number, _leave)


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C and SystemExit at the others while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.received, _State.patience = None, PATIENCE
    for number in NAMES:
        if _is_ours(number):
            signal.signal(number, _raise)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _State.writer = writer
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        end_at_once()
        signal.set_wakeup_fd(before)
        _State.writer = None
        writer.close()
        watcher.join()
        reader.close()


def _is_ours(number: int) -> bool:
    """Whether nobody outside has decided about this signal."""
    usual = (signal.SIG_DFL, signal.default_int_handler, _raise, _leave)
    return signal.getsignal(number) in usual


def _raise(number: int, frame: FrameType | None) -> None:
    _State.received = number
    if _State.writer is not None:
        with contextlib.suppress(OSError):
            _State.writer.send(HEARD)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code(number))


def _leave(number: int, frame: FrameType | None = None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{NAMES[number]}\n".encode())
    os._exit(exit_code(number))


def _watch(reader: socket.socket) -> None:
    """End the process where a signal came and the interpreter did not hear it in time.

    What is read is the number of each signal as it comes, and HEARD when a handler has run.
    """
    waiting: int | None = None  # a signal that nobody has heard yet
    while True:
        try:
            data = reader.recv(64)
        except TimeoutError:
            _leave(waiting or signal.SIGTERM)
        if not data:
            return
        seconds = _State.patience
        for number in data:
            if number == HEARD[0]:
                waiting = None
            elif number in NAMES:
                seconds = _State.patience if waiting is None else IMPATIENCE
                waiting = number
        reader.settimeout(None if waiting is None else seconds)
