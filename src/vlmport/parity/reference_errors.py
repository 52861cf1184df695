"""Turn exceptions of the reference's side into errors of one line.

The bundle may refuse the images and conversations that the reference can't read: RefusedError, and
a row tells whether both refuse (ladders/base.py). Where the reference can't be run, nothing is
known about the bundle: VerificationError.
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
    """Let the reference read images and messages: an error there is a refusal."""
    try:
        yield
    except Exception as error:
        foreign = isinstance(error, VerificationError) and error.__cause__
        raise RefusedError(one_line(foreign or error)) from error


@contextlib.contextmanager
def reference_runs(what: str) -> Iterator[None]:
    """Run the reference. Raises VerificationError for every exception that is not vlmport's own."""
    try:
        yield
    except (VlmportError, RefusedError):
        raise
    except Exception as error:
        hint = "check that the checkpoint runs in transformers itself"
        if isinstance(error, ImportError):
            hint = "install the package that the message names"
        raise VerificationError(
            f"transformers fails in {what}: {one_line(error)}",
            hint=f"nothing is known about the bundle; {hint}",
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
    """Return the kind and the text of an exception, cut to one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
    if isinstance(error, VlmportError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
