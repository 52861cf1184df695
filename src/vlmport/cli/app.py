"""The application that commands are registered with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlmport import __version__
from vlmport.cli.console import report, say, warnings_of_ours
from vlmport.errors import OptionError, OutputError, VlmportError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


class OneLineErrors(TyperGroup):
    """Commands whose errors are one line and a hint, without a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings_of_ours(), _usage_errors():
                return super().invoke(ctx)
        except OutputError as error:  # process.py reports it, at the end
            raise typer.Exit(error.exit_code) from error
        except VlmportError as error:
            report(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error


class SectionedCommand(TyperCommand):
    """A command whose --help has a section for each `rich_help_panel`, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            heading = getattr(parameter, "rich_help_panel", None)
            if (row := parameter.get_help_record(ctx)) is not None:
                heading = heading or ("Arguments" if is_argument else "Options")
                sections.setdefault(heading, []).append(row)
        for heading, rows in sections.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Print an error of the arguments as one line and a hint, as every other error."""
    try:
        yield
    except Exception as error:
        # An error of click, under typer's name for it. Without arguments, typer prints the help.
        is_usage = hasattr(error, "format_message") and hasattr(error, "ctx")
        if not is_usage or type(error).__name__ == "NoArgsIsHelpError":
            raise
        usage: Any = error
        command = "vlmport" if usage.ctx is None else usage.ctx.command_path
        said = " ".join(usage.format_message().split()).removesuffix(".")
        report(
            OptionError(
                said,
                hint=f"`{command} --help` lists its arguments and options",
                code="command.usage",
            )
        )
        raise typer.Exit(OptionError.exit_code) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Export small vision-language models to ONNX, verify the export, and run it anywhere.",
)


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"vlmport {__version__}")
        raise typer.Exit()
