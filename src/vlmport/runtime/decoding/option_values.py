"""Check one value of an option, and normalize it: numpy's numbers, lists and tuples are accepted.

Each function takes the option's name and the value, and raises OptionError that names both.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NoReturn

from vlmport.errors import OptionError, quoted

TokenIds = tuple[int, ...]

LARGEST = 2**63  # larger than any count or token id


def whole_number(name: str, value: Any, least: int, below: int | None = None) -> int:
    """Return an int, also from numpy's integers. Raises OptionError for other values."""
    number = _index(value)
    end = LARGEST if below is None else below
    if number is None or not least <= number < end:
        has_end = below is not None or (number or 0) >= end
        range_ = f"from {least} to {end - 1}" if has_end else f"of at least {least}"
        raise OptionError(
            f"{name}={quoted(value)}, expected a whole number {range_}",
            hint=f"for example {name}={max(least, 8)}",
            code="option.wrong-value",
        )
    return number


def at_least(least: int, below: int | None = None) -> Callable[[str, Any], int]:
    """Make a check for whole numbers from `least` on."""
    return lambda name, value: whole_number(name, value, least, below)


def number_in(
    expected: str, example: float, holds: Callable[[float], bool]
) -> Callable[[str, Any], float]:
    """Make a check for finite numbers for which `holds` is true."""

    def check(name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and holds(number)):
            _refuse(name, value, expected, f"for example {name}={example}")
        return number

    return check


def temperature(name: str, value: Any) -> float:
    """Check a number above 0. The error for 0 names the option to use instead."""
    if not isinstance(value, bool) and isinstance(value, Real) and value == 0:
        raise OptionError(
            f"{name}={quoted(value)}, expected a number above 0",
            hint="do_sample=False takes the most likely token each time",
            code="option.temperature-zero",
        )
    check = number_in("a number above 0", 1.2, lambda number: 1e-30 < number < 1e30)
    return check(name, value)


def flag(name: str, value: Any) -> bool:
    """Check True or False, also numpy's."""
    if type(value).__name__ not in ("bool", "bool_"):
        _refuse(name, value, "True or False", f"{name}=True or {name}=False")
    return bool(value)


def flag_or_never(name: str, value: Any) -> bool | Literal["never"]:
    """Check True, False or "never"."""
    if isinstance(value, str) and value == "never":
        return "never"
    if type(value).__name__ not in ("bool", "bool_"):
        _refuse(name, value, 'True, False or "never"', f"use {name}=True to stop soonest")
    return bool(value)


def token_ids(name: str, value: Any) -> TokenIds:
    """Check token ids, given as a list or as one id, and remove duplicates."""
    ids = _ids([value] if _index(value) is not None else value)
    if ids is None:
        _refuse(name, value, "token ids", f"for example {name}=[5, 17]")
    return tuple(dict.fromkeys(ids))


def token_sequences(name: str, value: Any) -> tuple[TokenIds, ...]:
    """Check sequences of at least one token id each, and remove duplicates."""
    sequences = [_ids(one) for one in value] if _is_list(value) else [None]
    if not all(sequences):
        _refuse(name, value, "a list of lists of token ids", f"for example {name}=[[5], [17, 4]]")
    return tuple(dict.fromkeys(one for one in sequences if one))


def sequence_bias(name: str, value: Any) -> tuple[tuple[TokenIds, float], ...]:
    """Check HF's two forms, {(5, 17): -2.0} and [[[5, 17], -2.0]]; the last duplicate counts."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    found = (
        [_biased(*pair) if _is_pair(pair) else None for pair in pairs] if _is_list(pairs) else []
    )
    if None in found or not _is_list(pairs):
        _refuse(
            name,
            value,
            "sequences of token ids with a number each",
            f"for example {name}=[[[5, 17], -2.0]]",
        )
    return tuple(dict(one for one in found if one).items())


def _biased(sequence: Any, bias: Any) -> tuple[TokenIds, float] | None:
    """Return a sequence and its bias, or None if they are not valid; -inf forbids the sequence."""
    ids = _ids(sequence)
    if not ids or isinstance(bias, bool) or not isinstance(bias, Real):
        return None
    try:
        number = float(bias)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return (ids, number) if number < math.inf else None


def decay(name: str, value: Any) -> tuple[int, float]:
    """Check (start, factor): a whole number and a positive number."""
    if not _is_pair(value):
        _refuse(name, value, "(start, factor)", f"for example {name}=(15, 1.1)")
    positive = number_in("a factor above 0", 1.1, lambda number: number > 0)
    return whole_number(f"{name}[0]", value[0], 0), positive(f"{name}[1]", value[1])


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Check one text or several, none of them empty, and remove duplicates."""
    several = [value] if isinstance(value, str) else value
    if not _is_list(several) or not all(isinstance(one, str) and one for one in several):
        _refuse(name, value, "a text or several, none empty", f"for example {name}=['\\n\\n']")
    for one in several:
        _check_unicode(name, one)
    return tuple(dict.fromkeys(several))


def pattern(name: str, value: Any) -> str:
    """Check that a regular expression is a text; the grammar compiles it."""
    if not isinstance(value, str) or not value:
        _refuse(name, value, "a regular expression", f"for example {name}='(yes|no)'")
    _check_unicode(name, value)
    return value


def grammar(name: str, value: Any) -> str:
    """Check that a grammar is a text; llguidance compiles it."""
    if not isinstance(value, str) or not value.strip():
        _refuse(name, value, "a grammar", f'for example {name}=\'start: "yes" | "no"\'')
    _check_unicode(name, value)
    return value


def schema(name: str, value: Any) -> str:
    """Return the text of a JSON schema that is an object, a text or a pydantic model."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(parsed) if isinstance(parsed, Mapping | bool) else None
    except (TypeError, ValueError):
        text = None
    if text is None:
        _refuse(name, value, "a JSON schema", f"for example {name}={{'type': 'object'}}")
    _check_unicode(name, json.dumps(json.loads(text), ensure_ascii=False))
    return text


def _check_unicode(name: str, text: str) -> None:
    """Raise OptionError for surrogates: bytes of the command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{name}={quoted(text)}: not Unicode at character {error.start}",
            hint="use UTF-8",
            code="option.not-unicode",
        ) from None


def _refuse(name: str, value: Any, expected: str, hint: str) -> NoReturn:
    raise OptionError(
        f"{name}={quoted(value)}, expected {expected}", hint=hint, code="option.wrong-value"
    )


def _index(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_pair(value: Any) -> bool:
    return _is_list(value) and len(value) == 2


def _ids(value: Any) -> TokenIds | None:
    """Return token ids, or None unless it is a list of whole numbers from 0 on."""
    if not _is_list(value):
        value = value.tolist() if hasattr(value, "tolist") else None
    ids = [_index(one) for one in value] if isinstance(value, Sequence) else [None]
    return (
        None
        if any(one is None or not 0 <= one < LARGEST for one in ids)
        else tuple(one for one in ids if one is not None)
    )
