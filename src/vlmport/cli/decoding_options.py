"""The options that choose tokens, for all commands that generate: Hugging Face's names.

They are the parameters of `read_decoding`. A `GeneratingCommand` has them in addition to its own,
and `decoding_of` gives what was typed, as keyword arguments for `VLM.generate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmport.cli.app import SectionedCommand
from vlmport.errors import OptionError, cut

KEY = "vlmport.decoding"  # in the context's `meta`
LENGTH, SAMPLING, BEAMS = "Length of the answer", "Sampling", "Beam search"
CONTENT, SPEED = "Content of the answer", "Speed"


def _in(heading: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel=heading)


def read_decoding(
    *,
    max_new_tokens: Annotated[int | None, _in(LENGTH, "Maximum number of new tokens.")] = None,
    min_new_tokens: Annotated[int | None, _in(LENGTH, "Minimum number of new tokens.")] = None,
    stop_strings: Annotated[
        list[str] | None,
        _in(
            LENGTH,
            "End the answer before this text; can be repeated.",
            "--stop-string",
            metavar="TEXT",
        ),
    ] = None,
    do_sample: Annotated[
        bool | None, _in(SAMPLING, "Sample tokens at random instead of taking the most likely.")
    ] = None,
    seed: Annotated[
        int | None, _in(SAMPLING, "Random seed for sampling (default: a new one each time).")
    ] = None,
    temperature: Annotated[
        float | None, _in(SAMPLING, "Below 1 is less random, above 1 more (default 1).")
    ] = None,
    top_k: Annotated[
        int | None, _in(SAMPLING, "Sample from the k most likely tokens (default 50, 0 = all).")
    ] = None,
    top_p: Annotated[
        float | None,
        _in(SAMPLING, "Sample from the fewest likely tokens that have this total probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        _in(SAMPLING, "Drop tokens less likely than this fraction of the most likely one."),
    ] = None,
    typical_p: Annotated[
        float | None,
        _in(SAMPLING, "Sample from the most typical tokens that have this total probability."),
    ] = None,
    num_beams: Annotated[
        int | None, _in(BEAMS, "Number of beams (default 1: no beam search).")
    ] = None,
    num_return_sequences: Annotated[
        int | None,
        _in(BEAMS, "Number of answers to print, best first; with --do-sample also without beams."),
    ] = None,
    length_penalty: Annotated[
        float | None, _in(BEAMS, "Above 0 prefers long answers, below 0 short ones (default 1).")
    ] = None,
    early_stopping: Annotated[
        Literal["true", "false", "never"] | None,
        _in(
            BEAMS,
            "Stop when there are as many answers as beams (true), when a better one is unlikely "
            "(false, the default), or when none is possible (never).",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        _in(CONTENT, "Above 1 makes a token less likely once it has occurred (default 1)."),
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        _in(CONTENT, "Never repeat a sequence of this many tokens (default 0: allow it)."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        _in(CONTENT, "Answer in JSON that fits the schema in this file.", metavar="FILE"),
    ] = None,
    regex: Annotated[
        str | None,
        _in(CONTENT, "Answer with a text that matches this regular expression.", metavar="REGEX"),
    ] = None,
    skip_special_tokens: Annotated[
        bool | None, _in(CONTENT, "Leave special tokens out of the text (default).")
    ] = None,
    logprobs: Annotated[
        int | None,
        _in(CONTENT, "With --json: report each token's log-probability and n alternatives."),
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None,
        _in(SPEED, "Save time: guess n tokens at once, copied from the text so far."),
    ] = None,
    max_matching_ngram_size: Annotated[
        int | None,
        _in(SPEED, "For this, look for a match of up to this many last tokens (default 2)."),
    ] = None,
    generation: Annotated[
        list[str] | None,
        _in(
            "More",
            "Any other option of Hugging Face's generate, its value in JSON; can be repeated.",
            "--option",
            metavar="NAME=VALUE",
        ),
    ] = None,
) -> dict[str, Any]:
    """Return the options that were given, as keyword arguments for `VLM.generate`.

    An option that is not given has the bundle's default. GenerationOptions checks ranges.

    Raises OptionError for a schema file or a value that can't be read.
    """
    return _read(locals())


_app = typer.Typer(add_completion=False)
_app.command()(read_decoding)
DECODING: Any = typer.main.get_command(_app)  # a command that is never run: its params are shared


class GeneratingCommand(SectionedCommand):
    """A command with the options of `read_decoding` in addition to its own.

    A command without --json has no --logprobs, which needs its rows.
    """

    def __init__(self, *arguments: Any, params: list[Any] | None = None, **options: Any):
        own = params or []
        has_rows = any(one.name == "as_json" for one in own)
        shared = [one for one in DECODING.params if has_rows or one.name != "logprobs"]
        super().__init__(*arguments, params=[*own, *shared], **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            self._read_decoding(ctx)
            return super().invoke(ctx)
        except OptionError as error:
            hint = None if error.hint is None else as_typed(error.hint)
            raise OptionError(as_typed(str(error)), hint=hint, code=error.code) from error

    def _read_decoding(self, ctx: Any) -> None:
        """Move the options of decoding from the command's arguments to the context."""
        given = {one.name: ctx.params.pop(one.name, None) for one in DECODING.params}
        if given["logprobs"] is not None and not ctx.params.get("as_json"):
            raise OptionError(
                "--logprobs without --json",
                hint="add --json: only its rows hold log-probabilities",
                code="option.contradiction",
            )
        ctx.meta[KEY] = DECODING.callback(**given)


# Name in Python → the option, and for a flag its negation.
NAMES = {one.name: (*one.opts, *one.secondary_opts) for one in DECODING.params}
del NAMES["generation"]
# Not after --option, where a name is as it was typed.
OPTION = re.compile(
    rf"(?<!--option )(?<![\w-])(?P<name>{'|'.join(NAMES)})(?P<value>=(?:True|False)\b|=|\b)"
)


def as_typed(message: str) -> str:
    """Write options in a message as on the command line: '--top-p 2.0' for 'top_p=2.0'."""

    def written(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if not value and "_" not in name:  # a word, such as 'temperature'
            return name
        option, *negation = NAMES[name]
        if negation:
            return negation[0] if value == "=False" else option
        return f"{option} {value[1:].lower()}" if value else option

    return OPTION.sub(written, message)


def decoding_of(ctx: typer.Context) -> dict[str, Any]:
    """The options of decoding that were given to a GeneratingCommand."""
    return dict(ctx.meta[KEY])


def _read(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what was not given, and read the values that are files or JSON."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for text in given.pop("generation", ()):
        name, is_, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (is_ and name):
            raise OptionError(
                f"--option {cut(text)}: expected NAME=VALUE",
                hint="for example --option max_length=100",
                code="option.wrong-value",
            )
        if name in given:
            raise OptionError(
                f"{name} is given twice",
                hint="give it once",
                code="option.contradiction",
            )
        hint = "for example --option bad_words_ids=[[5],[17,4]]"
        given[name] = _json(f"--option {cut(text)}", value, hint)
    if (early := given.get("early_stopping")) in ("true", "false"):
        given["early_stopping"] = early == "true"
    if (path := given.get("json_schema")) is not None and isinstance(path, Path):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"--json-schema {path}: {getattr(error, 'strerror', None) or error}",
                hint="check the path; it must be a file with a JSON schema",
                code="source.unreadable",
            ) from error
        given["json_schema"] = _json(f"--json-schema {path}", text, "check the file")
    return given


def _json(where: str, text: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(
            f"{where}: not JSON: {error}", hint=hint, code="option.not-json"
        ) from error
