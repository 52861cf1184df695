"""Expect an error by its code and its facts: the wording of a message may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import pytest

from vlmport.errors import VlmportError

E = TypeVar("E", bound=VlmportError)


@contextlib.contextmanager
def raises(kind: type[E], code: str, *facts: object) -> Iterator[pytest.ExceptionInfo[E]]:
    """Fail unless the block raises `kind` with this code, and the message holds all facts.

    Args:
        facts: names, numbers and paths that a user needs, in the order of the message.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert_error(caught.value, code, *facts)


def assert_error(error: VlmportError, code: str, *facts: object) -> None:
    """Fail unless `error` has this code, and its message holds all facts in this order."""
    message = str(error)
    assert error.code == code, message
    place = 0
    for fact in facts:
        found = message.find(str(fact), place)
        assert found >= 0, f"{fact!s} is not in {message!r} after character {place}"
        place = found + len(str(fact))
