"""The options of decoding, once for all commands that generate: Hugging Face's names."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmport.errors import OptionError, cut

Number, Count, Flag = float | None, int | None, bool | None


def _option(help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar)


# An option that is not given is the bundle's default. Ranges are checked where they are for all.
DECODING: Mapping[str, Any] = {
    "max_new_tokens": Annotated[Count, _option("At most so many tokens.")],
    "min_new_tokens": Annotated[Count, _option("At least so many tokens.")],
    "num_beams": Annotated[Count, _option("Beam search with so many beams.")],
    "num_return_sequences": Annotated[Count, _option("Print so many answers, best first.")],
    "length_penalty": Annotated[Number, _option("Of beams: above 0 longer ones are better.")],
    "early_stopping": Annotated[
        Literal["true", "false", "never"] | None, _option("When beam search stops.")
    ],
    "do_sample": Annotated[Flag, _option("Draw tokens instead of taking the best.")],
    "seed": Annotated[Count, _option("Of what is drawn; without one it differs each time.")],
    "temperature": Annotated[Number, _option("Above 1 more varied, below less.")],
    "top_k": Annotated[Count, _option("Draw among so many; 0 is all (50).")],
    "top_p": Annotated[Number, _option("Draw among the best of this probability.")],
    "min_p": Annotated[Number, _option("Draw what has this part of the best's probability.")],
    "typical_p": Annotated[Number, _option("Draw among the most typical of this probability.")],
    "repetition_penalty": Annotated[Number, _option("Above 1, used tokens get less likely.")],
    "no_repeat_ngram_size": Annotated[Count, _option("No n-gram of so many tokens twice.")],
    "stop_strings": Annotated[
        list[str] | None,
        _option("End before this text; can be repeated.", "--stop-string", metavar="TEXT"),
    ],
    "logprobs": Annotated[
        Count, _option("With --json: each token's log-probability, and so many others.")
    ],
    "json_schema": Annotated[
        Path | None, _option("Answer in JSON of this schema.", metavar="FILE")
    ],
    "regex": Annotated[str | None, _option("Answer with what matches this.", metavar="REGEX")],
    "skip_special_tokens": Annotated[Flag, _option("Leave special tokens out of the text.")],
    "prompt_lookup_num_tokens": Annotated[
        Count, _option("Guess so many tokens at a time from the text so far.")
    ],
    "max_matching_ngram_size": Annotated[
        Count, _option("The longest n-gram that the guess looks up.")
    ],
    "generation": Annotated[
        list[str] | None,
        _option(
            "Any other option of generate, its value in JSON; can be repeated.",
            "--option",
            metavar="NAME=VALUE",
        ),
    ],
}


def with_decoding(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options. Those that are given come to it as `decoding`, a dict.

    Raises OptionError for a schema file or a value that can't be read.
    """
    own = inspect.signature(command, eval_str=True)
    parameters = {name: one for name, one in own.parameters.items() if name != "decoding"}
    for name, annotation in DECODING.items():
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in DECODING}
        if given["logprobs"] is not None and not arguments.get("as_json"):
            raise OptionError(
                "--logprobs: nothing would show them",
                hint="caption and ask do, with --json",
                code="option.contradiction",
            )
        command(**arguments, decoding=_read(given))

    del run.__wrapped__
    run.__signature__ = own.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    return run


def _read(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `generate`, of what was given."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for text in given.pop("generation", ()):
        name, is_, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (is_ and name):
            raise OptionError(
                f"--option {cut(text)}: expected NAME=VALUE",
                hint="for example max_length=100",
                code="option.wrong-value",
            )
        if name in given:
            raise OptionError(
                f"{name} is given twice",
                hint="leave one of the two out",
                code="option.contradiction",
            )
        given[name] = _json(f"--option {cut(text)}", value)
    if (early := given.get("early_stopping")) in ("true", "false"):
        given["early_stopping"] = early == "true"
    if (path := given.get("json_schema")) is not None and isinstance(path, Path):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"--json-schema {path}: can't be read",
                hint="name a JSON file",
                code="source.unreadable",
            ) from error
        given["json_schema"] = _json(f"--json-schema {path}", text)
    return given


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(
            f"{where}: not JSON: {error}",
            hint="for example bad_words_ids=[[5],[17,4]]",
            code="option.not-json",
        ) from error
