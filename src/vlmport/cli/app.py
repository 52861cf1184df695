"""The application that commands are registered with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmport import __version__
from vlmport.cli.console import report, say, stderr, warnings_of_ours
from vlmport.cli.output import visible
from vlmport.errors import OutputError, VlmportError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


class OneLineErrors(TyperGroup):
    """Prints an error that the user can mend as one line and a hint, without a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings_of_ours(), _usage_errors():
                return super().invoke(ctx)
        except OutputError as error:  # the last thing that is said, by process.py
            raise typer.Exit(error.exit_code) from error
        except VlmportError as error:
            report(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Show what was typed as the console does: it may be the name of a stranger's file."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)  # click's, by whatever name typer has it
        if isinstance(message, str) and stderr.is_terminal:
            error.message = visible(message)  # pyright: ignore[reportAttributeAccessIssue]
        raise


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Export small vision-language models to ONNX, prove the export right, run it anywhere.",
)


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"vlmport {__version__}")
        raise typer.Exit()
