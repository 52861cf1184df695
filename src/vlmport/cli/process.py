"""Run the command line as a process: its streams, its signals, its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from vlmport import signals
from vlmport.cli.app import EXIT_FAILED, EXIT_INTERRUPTED, app
from vlmport.cli.console import report, say
from vlmport.cli.output import CLOSED_PIPE, output_problem, standard_streams
from vlmport.errors import VlmportError

TRACEBACK = "VLMPORT_TRACEBACK"  # set to print the traceback of a defect


def run_app() -> NoReturn:
    """Run the command in `sys.argv`, and exit with its code."""
    with standard_streams(), signals.ending_by_signals():
        code = _after_output(_exit_code())
    sys.exit(code)


def _exit_code() -> int:
    """Run the command; turn any end of it into an exit code and a line on stderr."""
    try:
        app(prog_name="vlmport")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else EXIT_FAILED
    except BaseException as error:
        # Libraries turn an interrupted import or call into errors of their own.
        code = _unexpected(error) if signals.received() is None else EXIT_FAILED
    number = signals.received()
    if number is None or code == EXIT_INTERRUPTED:  # then "interrupted" is printed already
        return code
    say(signals.NAMES[number])
    return signals.exit_code(number)


def _unexpected(error: BaseException) -> int:
    """Report an error that is not ours in a line; the traceback only on request."""
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    report(_explain(error))
    return VlmportError.exit_code


def _explain(error: BaseException) -> VlmportError:
    if isinstance(error, MemoryError):
        return VlmportError(
            "out of memory",
            hint="close other programs, or use a smaller model or precision",
            code="program.out-of-memory",
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        what = f"{where}{error.strerror or error}"
        return VlmportError(
            what[:500],
            hint="check the file, its permissions and the disk",
            code="program.file-error",
        )
    text = next(iter(str(error).splitlines()), "")[:200]
    return VlmportError(
        f"unexpected {type(error).__name__}: {text}",
        hint=f"this is a defect of vlmport: report it with the output of {TRACEBACK}=1",
        code="program.defect",
    )


def _after_output(code: int) -> int:
    """Flush stdout, and return the exit code: a failed write counts too."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # a stream that is not ours
        return code or EXIT_FAILED
    problem = output_problem()
    if problem is None or code > 2:  # more is ended by a signal
        return code
    if problem.code == CLOSED_PIPE:  # as other programs do, without a message
        return code or problem.exit_code
    report(problem)
    return problem.exit_code
