"""Exceptions of the reference's side, in one line.

What it can't read, a picture or a conversation, the bundle may refuse as well: RefusedError, and a
row says whether both do (ladders/base.py). Where it can't be run, nothing is said of the bundle:
VerificationError.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vlmport.errors import VerificationError, VlmportError

Kind = TypeVar("Kind")
WIDTH = 240  # characters of somebody else's message


class RefusedError(Exception):
    """The reference refuses a request; the text says why, in one line."""


@contextlib.contextmanager
def reference_reads() -> Iterator[None]:
    """Run what the reference makes of pictures and messages: an error there is a refusal."""
    try:
        yield
    except Exception as error:
        foreign = isinstance(error, VerificationError) and error.__cause__
        raise RefusedError(one_line(foreign or error)) from error


@contextlib.contextmanager
def reference_runs(what: str) -> Iterator[None]:
    """Run the reference. Raises VerificationError for whatever is raised but vlmport's own."""
    try:
        yield
    except (VlmportError, RefusedError):
        raise
    except Exception as error:
        hint = "does the checkpoint run in transformers itself?"
        if isinstance(error, ImportError):
            hint = "install what the message names"
        raise VerificationError(
            f"transformers fails in {what}: {one_line(error)}",
            hint=f"nothing is said of the bundle; {hint}",
            code="verify.reference-fails",
        ) from error


def in_one_line(kind: type[Kind]) -> type[Kind]:
    """Let the public methods of a reference raise VerificationError for foreign exceptions."""
    for name, method in list(vars(kind).items()):
        if not name.startswith("_") and callable(method):
            setattr(kind, name, _guarded(name, method))
    return kind


def _guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        with reference_runs(name):
            return method(*args, **options)

    return run


def one_line(error: BaseException) -> str:
    """The kind and the text of an exception, cut to a line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
    if isinstance(error, VlmportError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
