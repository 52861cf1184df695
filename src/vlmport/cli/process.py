"""One run of the command line as a process: its streams, its signals, its exit code."""

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

TRACEBACK = "VLMPORT_TRACEBACK"  # set by who looks for a defect


def run_app() -> NoReturn:
    """Run the command that `sys.argv` names, and leave with its exit code."""
    with standard_streams(), signals.ending_by_signals():
        code = _after_output(_exit_code())
    sys.exit(code)


def _exit_code() -> int:
    """Run it; whatever it ends by becomes an exit code, and a line on stderr."""
    try:
        app(prog_name="vlmport")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else EXIT_FAILED
    except BaseException as error:
        # Libraries turn an interrupted import or call into errors of their own.
        code = _unexpected(error) if signals.received() is None else EXIT_FAILED
    number = signals.received()
    if number is None or code == EXIT_INTERRUPTED:  # then "interrupted" is said already
        return code
    say(signals.NAMES[number])
    return signals.exit_code(number)


def _unexpected(error: BaseException) -> int:
    """Say in a line what nobody foresaw; the traceback is for who asks for it."""
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    report(_explain(error))
    return VlmportError.exit_code


def _explain(error: BaseException) -> VlmportError:
    if isinstance(error, MemoryError):
        return VlmportError(
            "out of memory",
            hint="close other programs, or take a smaller model",
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
        hint=f"this is a defect of vlmport: report it with what {TRACEBACK}=1 shows",
        code="program.defect",
    )


def _after_output(code: int) -> int:
    """The code once stdout is flushed: what could not be written there is a problem too."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # a stream that is not ours
        return code or EXIT_FAILED
    problem = output_problem()
    if problem is None or code > 2:  # more is ended by a signal
        return code
    if problem.code == CLOSED_PIPE:  # as other programs do, without a word
        return code or problem.exit_code
    report(problem)
    return problem.exit_code
