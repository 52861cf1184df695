"""The command line in forked children: as much a process as any, without a second of imports each.

    results = run_cases([Case(["models"], stdout="full")])

Forks are safe in a process without threads only, so `run_cases` starts one that has none.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 60  # after which a child is killed
DEFECT = 99  # the exit code of an exception that left main()
# What a stream can be: a file that is kept, or one that fails in one of these ways.
STREAMS = ("kept", "full", "closed", "nobody", "terminal")


@dataclass(frozen=True)
class Case:
    """A command and its surroundings.

    Attributes:
        stdout, stderr: one of STREAMS.
        stdin: its text; None for a closed one.
        encoding: what Python takes for stdout and stderr.
        signal: sent to the child after `after` seconds.
        lean: limits the size of a file, as a full disk does.
    """

    arguments: Sequence[str]
    stdout: str = "kept"
    stderr: str = "kept"
    stdin: str | None = ""
    encoding: str = "utf-8"
    environment: dict[str, str] = field(default_factory=dict)
    signal: int | None = None
    after: float = 0.0
    lean: int | None = None


@dataclass(frozen=True)
class Result:
    """What came of it; `code` is None where there was no end, below 0 where a signal killed it."""

    code: int | None
    out: str
    err: str


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """Run them in a process of their own, one after the other."""
    told = json.dumps([dataclasses.asdict(case) for case in cases])
    command = [sys.executable, "-m", "tests.forked"]
    done = subprocess.run(
        command, input=told, capture_output=True, text=True, cwd=ROOT, check=True, timeout=600
    )
    return [Result(**one) for one in json.loads(done.stdout)]


def run_case(case: Case, seconds: float = SECONDS) -> Result:
    """Fork, run the command in the child, and wait for it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        terminals = [_Terminal(out), _Terminal(err)]
        # Until the child has its own handlers, signals wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if pid == 0:
            _child(case, out, err, terminals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            code = _wait(pid, case, seconds, terminals)
        finally:
            for one in terminals:
                one.close()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Result(code, *texts)


class _Terminal:
    """A terminal whose screen is a file."""

    def __init__(self, screen: IO[bytes]):
        self.screen = screen
        self.end, self.child = os.openpty()
        os.set_blocking(self.end, False)

    def read(self) -> None:
        try:
            while data := os.read(self.end, 65536):
                self.screen.write(data)
                self.screen.flush()
        except OSError:  # nothing yet, or nobody left
            pass

    def close(self) -> None:
        self.read()
        os.close(self.end)
        os.close(self.child)


def _wait(pid: int, case: Case, seconds: float, terminals: list[_Terminal]) -> int | None:
    end = time.monotonic() + seconds
    sent = case.signal is None
    start = time.monotonic()
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if not sent and time.monotonic() - start >= case.after:
            sent = True
            os.kill(pid, case.signal or 0)
        for one in terminals:
            one.read()
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _child(case: Case, out: IO[bytes], err: IO[bytes], terminals: list[_Terminal]) -> NoReturn:
    code = DEFECT
    try:
        kept = os.dup(err.fileno())
        _settle(case, out, err, terminals)
        from vlmport.__main__ import main

        sys.argv = ["vlmport", *case.arguments]
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else DEFECT
        except BaseException:
            os.write(kept, traceback.format_exc().encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _settle(case: Case, out: IO[bytes], err: IO[bytes], terminals: list[_Terminal]) -> None:
    """The streams, signals, limits and variables of the child."""
    gc.callbacks.clear()  # Hypothesis's: a signal that comes in one is "ignored" with a traceback
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ.update(case.environment)
    if case.stdin is None:
        os.close(0)
        sys.stdin = None
    else:
        reader, writer = os.pipe()
        os.write(writer, case.stdin.encode(errors="surrogateescape")[:60000])
        os.close(writer)
        os.dup2(reader, 0)
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8")  # noqa: SIM115
    sys.stdout = _stream(1, case.stdout, out, terminals[0].child, case.encoding, "strict")
    sys.stderr = _stream(2, case.stderr, err, terminals[1].child, case.encoding, "backslashreplace")
    if case.lean is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.lean, case.lean))


def _stream(number: int, kind: str, file: IO[bytes], terminal: int, code: str, errors: str) -> Any:
    if kind == "closed":
        os.close(number)
        return None
    if kind == "full":
        opened = os.open("/dev/full", os.O_WRONLY)
    elif kind == "nobody":
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = terminal if kind == "terminal" else file.fileno()
    os.dup2(opened, number)
    raw = open(number, "wb", closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(raw, code, errors, line_buffering=kind == "terminal" or number == 2)


def _main() -> None:
    import numpy  # noqa: F401, imported once for all children
    import onnxruntime  # noqa: F401
    from PIL import Image  # noqa: F401

    import vlmport.cli
    import vlmport.loading  # noqa: F401

    cases = [Case(**one) for one in json.load(sys.stdin)]
    results = [dataclasses.asdict(run_case(case)) for case in cases]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
