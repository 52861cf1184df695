"""A process that can be killed, for computations that come from an untrusted file.

A chat template is a program, and a tokenizer's regular expression can take forever; both come with
a model from an unknown source. `Worker.ask` sends a request to a process with limits of time and
memory, an empty environment and no right to open a file or a socket. A process that does not answer
in time is killed, and the next request starts another.

The process starts when it is first needed, and is kept for later requests. It ends when its input
closes, so together with this process. After a fork the child starts its own.

Traps:
- `multiprocessing` would import the user's main module; a plain subprocess does not.
- Ctrl-C in a terminal goes to all processes of a group: the worker is in another group, and is
  killed when the wait for it is interrupted.
- A frozen program is its own `sys.executable`, so it would start itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

SECONDS = (
    10.0  # limit of one request; the templates and tokenizers of real models take milliseconds
)
START_SECONDS = 60.0  # limit of starting the process, on a busy machine
MEMORY = 512 << 20
ANSWER = 1 << 24
MESSAGE = 200  # maximum characters of an error message of the process
KEPT = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "TZDIR", "LANG", "LC_ALL")
PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]; from vlmport.text.services import main; "
    "main(*sys.argv[1:4])"
)

TIME, SPACE, CRASH, NO_START = "time", "memory", "crash", "start"


class StoppedError(Exception):
    """A request that was stopped.

    Attributes:
        reason: TIME, SPACE (memory, or a long answer), CRASH or NO_START.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class RefusedError(Exception):
    """The message of an exception in the process, in at most MESSAGE characters."""


class Worker:
    """One process for requests of one kind, answered one after the other.

    Attributes:
        seconds: maximum time of one request.
        memory: maximum bytes that the process may allocate after its start.
        answer: maximum characters of one answer.
    """

    def __init__(
        self, kind: str, *, seconds: float = SECONDS, memory: int = MEMORY, answer: int = ANSWER
    ):
        self.kind, self.seconds, self.memory, self.answer = kind, seconds, memory, answer
        self.forget()
        _workers.add(self)

    def ask(self, request: Any) -> Any:
        """Return the answer to a request; both are JSON values.

        Raises RefusedError for an exception in the process, StoppedError at a limit.
        """
        with self._lock:
            process = self._running()
            text = json.dumps([self.seconds, request]).encode() + b"\n"
            return self._read(process, text, self.seconds)

    def close(self) -> None:
        """Kill the process, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # unwritten data is lost
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        process.wait()

    def forget(self) -> None:
        """Give up the process, which belongs to this process's parent, without killing it."""
        process: subprocess.Popen[bytes] | None = getattr(self, "_process", None)
        if process is not None:
            process.returncode = 0  # only the parent may wait for it
            for pipe in (process.stdin, process.stdout):
                pipe.raw.close()  # pyright: ignore  (writes nothing)
        self._lock = threading.Lock()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, and start it if it does not run."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = process = _start(self.kind, self.memory, self.answer)
            try:
                self._read(process, b"", START_SECONDS)
            except StoppedError as error:
                raise StoppedError(NO_START, f"its process did not start: {error}") from None
        return self._process

    def _read(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> Any:
        """Write the request, if any, and read one answer. A failure kills the process."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
            line = process.stdout.readline(12 * self.answer + 1000)  # the maximum length as JSON
            kind, value = json.loads(line) if line.endswith(b"\n") else (CRASH, None)
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            kind = TIME
        if kind in (TIME, SPACE, CRASH):
            self.close()
        if kind == TIME:
            raise StoppedError(TIME, f"it did not end within {seconds:g} seconds")
        if kind == SPACE:
            raise StoppedError(SPACE, f"it took more than {self.memory >> 20} MB of memory")
        if kind == CRASH:
            raise StoppedError(CRASH, "it crashed its process")
        if kind == "long":
            raise StoppedError(SPACE, f"it wrote more than {self.answer} characters")
        if kind == "refused":
            raise RefusedError(str(value)[:MESSAGE])
        return value


def _start(kind: str, memory: int, answer: int) -> subprocess.Popen[bytes]:
    """Start a Python that inherits only the paths of modules."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [str(Path(one).resolve()) for one in sys.path if one]
    flags = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")  # on Windows
    try:
        return subprocess.Popen(
            [_python(), "-I", "-S", "-c", PROGRAM, kind, str(memory), str(answer), here, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.sep if os.name == "posix" else None,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            start_new_session=os.name == "posix",
            creationflags=sum(getattr(subprocess, name, 0) for name in flags),
        )
    except OSError as error:
        message = f"its process did not start: {error.strerror or error}"
        raise StoppedError(NO_START, message) from error


def _python() -> str:
    name = Path(sys.executable or "").name.lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise StoppedError(NO_START, f"its process needs a Python, and this is {name or 'none'}")
    return sys.executable


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _close_all() -> None:
    for worker in list(_workers):
        worker.close()


def _forget_all() -> None:
    for worker in list(_workers):
        worker.forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
