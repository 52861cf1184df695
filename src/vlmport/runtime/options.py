"""What a caller may ask of a generation."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmport.errors import OptionError, did_you_mean


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one generation, with the meaning that Hugging Face's `generate` gives them.

    Attributes:
        max_new_tokens: stop after so many; None takes the bundle's default.
        min_new_tokens: before so many, the stop tokens can't be chosen.

    Raises OptionError for a value out of its range.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            self._set("max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens, 1))
        self._set("min_new_tokens", whole_number("min_new_tokens", self.min_new_tokens, 0))
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={self.max_new_tokens}",
                hint="raise one or lower the other",
            )

    def _set(self, name: str, value: int) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass may still tidy its own fields

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationOptions:
        """From keyword arguments. Raises OptionError for unknown names, with the nearest known."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"{name!r}{did_you_mean(name, known)}" for name in given if name not in known]
        if unknown:
            raise OptionError(
                f"unknown option {', '.join(unknown)}", hint=f"known: {', '.join(known)}"
            )
        return cls(**given)


def whole_number(name: str, value: Any, least: int) -> int:
    """An int, numpy's too. Raises OptionError for anything else, and below `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise OptionError(
            f"{name}={value!r}, expected a whole number of at least {least}",
            hint=f"for example {name}={max(least, 8)}",
        )
    return number
