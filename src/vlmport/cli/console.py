"""Messages of the commands: a line each on stderr, and bars while they work."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from vlmport.cli.output import visible
from vlmport.errors import AnswerWarning, VlmportError, VlmportWarning

if TYPE_CHECKING:
    from vlmport.exporter import Progress
    from vlmport.parity.judging import Progress as Counted  # done, all, what is next


class SafeConsole(Console):
    """A console that writes no control characters to a terminal but its own."""

    @property
    def file(self) -> IO[str]:
        stream = super().file
        return getattr(stream, "exact", stream)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control is None and self.is_terminal:
                yield Segment(visible(text), style)
            else:
                yield segment


stdout, stderr = SafeConsole(), SafeConsole(stderr=True)


def report(error: VlmportError) -> None:
    """Print an error on stderr: one line, and its hint under it."""
    message = " ".join(str(error).splitlines())
    say(f"error[{error.code}]: {message}", style="red")
    if error.hint:
        say(f"hint: {error.hint}")


def say(text: str, style: str | None = None) -> None:
    """Print a line on stderr as it is: paths may hold brackets, and only terminals wrap."""
    stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def command_line(parts: Sequence[str]) -> str:
    """Join a command so that the user's shell reads it as these parts."""
    return subprocess.list2cmdline(parts) if os.name == "nt" else shlex.join(parts)


@contextlib.contextmanager
def warnings_of_ours() -> Iterator[None]:
    """Print each of our warnings as one line, without a place in the code."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.simplefilter("always", AnswerWarning)  # each answer has its own

        def shown(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if isinstance(message, VlmportWarning):
                say(f"warning[{message.code}]: {message}")
            else:
                show(visible(str(message)), category, *rest)

        warnings.showwarning = shown
        yield


@contextlib.contextmanager
def export_progress() -> Iterator[Progress | None]:
    """Show a bar on stderr from the first bytes on; none where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("exporting {task.description}"), BarColumn(), DownloadColumn())
    with Bar(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)

        yield update


def verify_progress() -> contextlib.AbstractContextManager[Counted | None]:
    """Show a bar on stderr during the checks; none where stderr is no terminal."""
    return _counting("verifying")


def eval_progress() -> contextlib.AbstractContextManager[Counted | None]:
    """Show a bar on stderr while images are captioned; none where stderr is no terminal."""
    return _counting("measuring")


def bench_progress() -> contextlib.AbstractContextManager[Counted | None]:
    """Show a bar on stderr while a bundle is timed; none where stderr is no terminal."""
    return _counting("timing")


@contextlib.contextmanager
def _counting(verb: str) -> Iterator[Counted | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(f"{verb} {{task.description}}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)
            if done == total:
                bar.stop()  # the report comes now

        yield update
