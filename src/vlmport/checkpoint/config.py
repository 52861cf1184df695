"""Read config.json into frozen dataclasses.

A family states the facts it needs as a frozen dataclass; `read_config` fills it and raises once,
naming everything that is wrong. Field defaults are those of the Hugging Face config class, so an
absent key means the same in both.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vlmport.errors import ConfigError, did_you_mean, some_names

__all__ = ["Layers", "Signed", "Size", "Within", "read_config", "subsection"]

C = TypeVar("C")


MOST = 2**31 - 1  # the maximum of any number here; ONNX holds no dimension beyond 2^63


@dataclasses.dataclass(frozen=True)
class Within:
    """The bounds of an `Annotated[int, Within(least, most)]` field, both included."""

    least: int = 0
    most: int = MOST

    def describe(self) -> str:
        least = f" of at least {self.least}" if self.least >= 0 else ""
        return f"an int{least}{f' and at most {self.most}' if self.most != MOST else ''}"


@dataclasses.dataclass
class _Problems:
    """Keys that are missing or mistyped, and values that vlmport does not support."""

    wrong: list[str] = dataclasses.field(default_factory=list)
    unsupported: list[str] = dataclasses.field(default_factory=list)


Size = Annotated[int, Within(1)]
Signed = Annotated[int, Within(-MOST)]
Layers = Annotated[int, Within(1, 1000)]  # each is written, so a wrong number would run for ever


def read_config(cls: type[C], raw: Mapping[str, Any], where: str) -> C:
    """Fill the dataclass `cls` from a section of config.json.

    Plain `int` fields take 0 and more, `Size` 1 and more, `Signed` any, up to 2^31 - 1; `Layers` 1
    to 1000. Nested dataclasses, tuples,
    Literal and `X | None` are understood. Keys that `cls` does not know are ignored, unless its
    ClassVar `must_be` (key → accepted values) says that they change the maths.

    Args:
        where: what to call the section in errors, such as "config.json: text_config".

    Raises ConfigError with all missing keys, all mistyped ones and all unsupported values.
    """
    problems = _Problems()
    values = _read_fields(cls, raw, where, problems)
    if found := [*problems.wrong, *problems.unsupported]:
        hint = f"vlmport reads these keys as {cls.__name__}; does the file belong to this model?"
        code = "config.wrong-value" if problems.wrong else "config.unsupported-value"
        raise ConfigError(f"{where}: " + "; ".join(found), hint=hint, code=code)
    return cls(**values)


def subsection(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return a section of config.json that is itself an object; {} if it is absent or null.

    Raises ConfigError for anything else.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(
            f"{where}: {key}: expected an object, got {_show(value)}",
            hint="does the file belong to this model?",
            code="config.wrong-value",
        )
    return value or {}


def _read_fields(
    cls: type[Any], raw: Mapping[str, Any], where: str, problems: _Problems
) -> dict[str, Any]:
    """Read the keyword arguments of `cls`; faults are appended to `problems`."""
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    missing: list[str] = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if field.name in raw:
            values[field.name] = _read(hints[field.name], raw[field.name], field.name, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(field.name)
    if missing:
        near = "".join(did_you_mean(name, raw) for name in missing[:1] if len(missing) == 1)
        problems.wrong.insert(0, f"missing {some_names(missing, limit=99)}{near}")
    problems.unsupported.extend(_unsupported(getattr(cls, "must_be", {}), raw))
    return values


def _unsupported(must_be: Mapping[str, Sequence[Any]], raw: Mapping[str, Any]) -> list[str]:
    """Describe every key whose value is not among the accepted ones: true is not 1 here."""
    problems = []
    for key, accepted in must_be.items():
        if key in raw and not any(_same(raw[key], value) for value in accepted):
            supported = ", ".join(_show(value) for value in accepted)
            problems.append(f"{key}={_show(raw[key])} (supported: {supported})")
    return problems


def _same(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _read(hint: Any, value: Any, key: str, problems: _Problems) -> Any:
    """Read `value` as the type `hint`; None and an entry in `problems` if it has another."""
    read, ok = _convert(hint, value, key, problems)
    if not ok:
        too_large = " (too large)" if isinstance(value, int) and abs(value) > MOST else ""
        problems.wrong.append(f"{key}: expected {_describe(hint)}, got {_show(value)}{too_large}")
    return read


def _convert(hint: Any, value: Any, key: str, problems: _Problems) -> tuple[Any, bool]:
    """Convert a value: (converted, whether that was possible)."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value, True
    if origin in (Union, types.UnionType):
        nested = next((arg for arg in args if dataclasses.is_dataclass(arg)), None)
        if nested and isinstance(value, dict):
            return _convert(nested, value, key, problems)
        trials = (_convert(arg, value, key, problems) for arg in args)
        return next((trial for trial in trials if trial[1]), (None, False))
    if origin is Annotated:
        bounds = next((arg for arg in args[1:] if isinstance(arg, Within)), Within())
        return (value, _is_int(value, bounds)) if args[0] is int else (value, False)
    if origin is Literal:
        return value, any(_same(value, arg) for arg in args)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _nested(hint, value, key, problems)
    if origin in (tuple, list, Sequence):
        return _sequence(hint, value, key, problems)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return value, isinstance(value, dict)
    if hint is float:
        return _float(value)
    if hint is int:
        return value, _is_int(value, Within())
    if hint is None or hint is types.NoneType:
        return None, value is None
    return value, isinstance(hint, type) and type(value) is hint


def _nested(cls: type[Any], value: Any, key: str, problems: _Problems) -> tuple[Any, bool]:
    if not isinstance(value, dict):
        return None, False
    inner = _Problems()
    values = _read_fields(cls, value, key, inner)
    problems.wrong.extend(f"{key}: {problem}" for problem in inner.wrong)
    problems.unsupported.extend(f"{key}: {problem}" for problem in inner.unsupported)
    return (None if inner.wrong or inner.unsupported else cls(**values)), True


def _sequence(hint: Any, value: Any, key: str, problems: _Problems) -> tuple[Any, bool]:
    origin, args = get_origin(hint), get_args(hint)
    if not isinstance(value, list):
        return None, False
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(args) != len(value):
            return None, False
        kinds: Sequence[Any] = args
    else:
        kinds = [args[0]] * len(value)
    read = [
        _convert(kind, item, f"{key}[{i}]", problems)
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]
    items = (item for item, _ in read)
    return (list(items) if origin is list else tuple(items)), all(ok for _, ok in read)


def _float(value: Any) -> tuple[float | None, bool]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, False
    try:
        number = float(value)
    except OverflowError:
        return None, False
    return number, math.isfinite(number)


def _is_int(value: Any, bounds: Within) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return bounds.least <= value <= bounds.most


def _describe(hint: Any) -> str:
    """Describe a type in the words of JSON."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Annotated:
        bounds = next((arg for arg in args[1:] if isinstance(arg, Within)), Within())
        return bounds.describe()
    if origin is Literal:
        return " or ".join(_show(arg) for arg in args)
    if origin in (tuple, list, Sequence):
        kinds = " and ".join(dict.fromkeys(_describe(arg) for arg in args if arg is not Ellipsis))
        fixed = origin is tuple and Ellipsis not in args
        return f"a list of {len(args)}, each {kinds}" if fixed else f"a list, each {kinds}"
    if origin in (dict, Mapping) or hint in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "an object"
    names = {float: "a finite number", int: Within().describe(), bool: "true or false"}
    names |= {str: "a string", types.NoneType: "null", None: "null"}
    return names.get(hint, str(hint))


def _show(value: Any) -> str:
    """Show a value as JSON writes it, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
