"""Write docs/cli.md from the commands, or check that it is what they say.

python -m tests.cli_reference            # write
python -m tests.cli_reference --check    # exit 1 where the page differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from vlmport import cli

PAGE = Path(__file__).parents[1] / "docs/cli.md"
SHARING = ("caption", "ask", "chat")  # commands with the same options of decoding

HEAD = """\
# The command line

<!-- Written by `python -m tests.cli_reference`: do not edit. -->

`vlmport COMMAND --help` prints the same. Results go to stdout, progress and messages to stderr.

| exit code | meaning |
| --: | --- |
| 0 | done |
| 1 | a check failed (`verify`, `eval`, `inspect --probe`), or the reader of the output has ended |
| 2 | bad input; one line says what is wrong, and a hint says what to do |
| 130, 143, 129 | ended by Ctrl-C, SIGTERM, SIGHUP |
"""


@dataclass(frozen=True)
class Row:
    """An argument or an option, as the table shows it."""

    name: str
    meaning: str
    heading: str  # of its section in --help


def row(parameter: Any, context: Any) -> Row:
    """The row of a parameter, from what --help prints of it."""
    name, text = parameter.get_help_record(context)
    name = name.replace("int range", "int").replace("|", "\\|")
    return Row(f"`{name}`", _sentence(text), getattr(parameter, "rich_help_panel", None) or "")


def _sentence(text: str | None) -> str:
    """A help text as a cell of a table, with its default and its range in words."""
    text, bracket, facts = " ".join((text or "").split()).replace("|", "\\|").partition(" [")
    shown = []
    for fact in facts.rstrip("]").split("; ") if bracket else ():
        kind, colon, value = fact.partition(": ")
        least, x, most = fact.partition("<=x<=") if "<=x<=" in fact else fact.partition("x>=")
        if x:
            shown.append(f" {least} to {most}." if least else f" {most} or more.")
        else:
            shown.append(f" {kind.capitalize()}: `{value}`." if colon else f" {fact.capitalize()}.")
    return text + "".join(shown)


def table(head: str, rows: Iterable[Row]) -> list[str]:
    """A table of rows, or nothing for none."""
    lines = [f"| {one.name} | {one.meaning} |" for one in rows]
    return ["", f"| {head} | |", "| --- | --- |", *lines] if lines else []


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(cli.app)
    commands = {name: group.commands[name] for name in group.list_commands(None)}
    context = {name: _context(one, name) for name, one in commands.items()}
    options = {name: _rows(one, context[name], "option") for name, one in commands.items()}
    shared = [one for one in options[SHARING[0]] if all(one in options[c] for c in SHARING)]
    lines = [HEAD]
    for name, command in commands.items():
        lines += [f"## {name}", "", "```text", _usage(command, context[name]), "```", ""]
        lines += [" ".join(part.split()) + "\n" for part in command.help.split("\n\n")]
        lines[-1] = lines[-1].rstrip()
        lines += table("argument", _rows(command, context[name], "argument"))
        own = options[name]
        if name in SHARING:
            own = [one for one in own if one not in shared]
        lines += table("option", own)
        if name in SHARING:
            lines += ["", "And [the options of all three](#options-of-caption-ask-and-chat)."]
        lines.append("")
    lines += ["## Options of caption, ask and chat", ""]
    lines += ["[Decoding](decoding.md#options) explains those that choose tokens."]
    for heading in dict.fromkeys(one.heading for one in shared):
        lines += ["", f"### {heading}"]
        lines += table("option", [one for one in shared if one.heading == heading])
    return "\n".join(lines) + "\n"


def _context(command: Any, name: str) -> Any:
    return command.context_class(command, info_name=f"vlmport {name}")


def _usage(command: Any, context: Any) -> str:
    return " ".join(["vlmport", command.name, *command.collect_usage_pieces(context)])


def _rows(command: Any, context: Any, kind: str) -> list[Row]:
    parameters: Sequence[Any] = command.params
    return [row(one, context) for one in parameters if one.param_type_name == kind]


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text("utf-8") != page():
            sys.exit(f"{PAGE.name} is out of date: run python -m tests.cli_reference")
    else:
        PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
