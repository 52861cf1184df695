"""Print answers: as text, or as a row of JSON."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlmport.cli.output import show, to_json
from vlmport.errors import ImageError, PromptError, VlmportError

if TYPE_CHECKING:
    from vlmport.runtime.model import Response


def json_row(asked: Mapping[str, Any], name: str, response: Response) -> str:
    """Write a row of JSON: what was asked, and the fields of the answer, with its text as `name`.

    Fields that are empty because nobody asked for them are left out.
    """

    def given(fields: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if value not in (None, ())}
        return kept | {name: fields[name] for name in ("stop_reason", "complete")}

    fields = dataclasses.asdict(response)
    others = tuple(given(one) for one in fields["alternatives"])
    row = {**asked, name: fields.pop("text")}
    return to_json(row | given(fields | {"alternatives": others}))


def error_row(asked: Mapping[str, Any], error: VlmportError) -> str:
    """Write a row of JSON: what was asked, and the error's code, message and hint as `error`."""
    return to_json({**asked, "error": error.to_json()})


@contextlib.contextmanager
def errors_as_rows(asked: Mapping[str, Any], *, as_json: bool) -> Iterator[None]:
    """Print the row of an error of an image or a prompt in the block, and raise the error."""
    try:
        yield
    except (ImageError, PromptError) as error:
        if as_json:
            show(error_row(asked, error))
        raise


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text without the space at its ends, which many models write."""
    held = None  # None until there is text
    for piece in pieces:
        piece = piece.lstrip() if held is None else held + piece
        if text := piece.rstrip():
            yield text
            held = piece[len(text) :]
        elif held is not None:
            held = piece
