"""The application that commands are registered with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmport import __version__
from vlmport.cli.console import report, say, warnings_of_ours
from vlmport.errors import OptionError, OutputError, VlmportError

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
    """Print what is wrong with the arguments as one line and a hint, as every other error."""
    try:
        yield
    except Exception as error:
        # click's, by whatever name typer has it; without arguments it prints the help instead.
        is_usage = hasattr(error, "format_message") and hasattr(error, "ctx")
        if not is_usage or type(error).__name__ == "NoArgsIsHelpError":
            raise
        usage: Any = error
        command = "vlmport" if usage.ctx is None else usage.ctx.command_path
        said = " ".join(usage.format_message().split()).removesuffix(".")
        report(OptionError(said, hint=f"`{command} -h` shows its use", code="command.usage"))
        raise typer.Exit(OptionError.exit_code) from error


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
