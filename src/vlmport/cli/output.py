"""Standard streams that work however the process was started.

- A character that the encoding lacks is replaced by "?". JSON is written with \\u escapes instead.
- When a write fails (a full disk, a reader that ended, a closed stream), later text is dropped and
  the problem is kept, so that what a command writes elsewhere is not lost.
- A terminal gets no control characters of a caption, a file's name or an error: they are replaced
  by U+FFFD. Files and pipes get the text as it is.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from vlmport.errors import OutputError

# Controls of the two ranges but tab and newline, and those that turn the direction of writing
# within a line. Marks of direction and joiners stay: Arabic, Hebrew and Hindi need them.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CLOSED_PIPE = "output.closed-pipe"
GONE = (errno.EPIPE, errno.ESHUTDOWN)  # the reader has ended


def visible(text: str) -> str:
    """Replace each character that a terminal would obey instead of show."""
    return UNSAFE.sub(REPLACEMENT, text)


def to_json(value: Any) -> str:
    """Write one line of JSON that stdout's encoding can hold and that a terminal can show.

    Where a character can't be written as it is, its \\u escape is: the value stays exact.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (LookupError, UnicodeError):
        return json.dumps(value)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Output(io.TextIOWrapper):
    """A standard stream of text. Writing never raises.

    Attributes:
        problem: why a write failed, or None.
        exact: the same stream for text whose control characters are our own.
    """

    problem: OSError | None = None

    def __init__(self, buffer: Any, encoding: str, *, safe: bool, line_buffering: bool):
        errors = "replace" if safe else "backslashreplace"
        super().__init__(buffer, encoding, errors, line_buffering=line_buffering)
        self.exact = _Exact(self)
        self._cleans = safe and self.isatty()

    def write(self, text: str, /) -> int:
        self.write_exact(visible(text) if self._cleans else text)
        return len(text)

    def write_exact(self, text: str) -> int:
        """Write text as it is, control characters included."""
        if self.problem is None:
            try:
                super().write(text)
            except OSError as error:
                self._break(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._break(error)

    def _break(self, error: OSError) -> None:
        """Keep the problem, and let what is still in buffers go nowhere."""
        self.problem = self.problem or error
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            super().flush()


class _Exact:
    """A stream whose `write` replaces nothing."""

    def __init__(self, stream: Output):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write_exact(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Replace stdin, stdout and stderr by streams as above while the block runs."""
    before = sys.stdin, sys.stdout, sys.stderr
    blocking = _open_all()
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_WRONLY), encoding="utf-8")  # noqa: SIM115
    sys.stdout = _output(before[1], safe=True)
    sys.stderr = _output(before[2], safe=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Output):
                stream.flush()
                stream.detach()
        sys.stdin, sys.stdout, sys.stderr = before
        for number in blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(number, False)


def _open_all() -> list[int]:
    """Open what is closed, so that no other file gets its number and what is written there.

    It is opened in the opposite direction: reading from it or writing to it fails, as it should.
    Returns those that are made to block and did not: a write of much text would fail half-way.
    """
    made_blocking = []
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, flags)
            continue
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: Python 3.11 on Windows
            if not os.get_blocking(number):
                os.set_blocking(number, True)
                made_blocking.append(number)
    return made_blocking


def _output(stream: Any, *, safe: bool) -> Any:
    """Wrap a stream as an Output; one that has no bytes under it stays as it is."""
    if stream is None:
        raw = open(os.open(os.devnull, os.O_RDONLY), "wb")  # noqa: SIM115
        return Output(raw, "utf-8", safe=safe, line_buffering=not safe)
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return Output(buffer, stream.encoding, safe=safe, line_buffering=stream.line_buffering)


def show(text: str = "", end: str = "\n") -> None:
    """Print to stdout at once. Raises OutputError when nothing more can be written there."""
    print(text, end=end, flush=True)
    if (error := output_problem()) is not None:
        raise error


def output_problem() -> OutputError | None:
    """Return the problem of writing to stdout so far, as an error of ours."""
    problem = getattr(sys.stdout, "problem", None)
    if problem is None:
        return None
    if problem.errno in GONE or (os.name == "nt" and problem.errno == errno.EINVAL):
        error = OutputError("standard output: its reader has ended", code=CLOSED_PIPE)
        error.exit_code = 1
        return error
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OutputError(
        f"standard output can't be written: {problem.strerror or problem}",
        hint="free some space, and run it again" if full else "check where it is redirected to",
        code="output.unwritable",
    )
