"""Describe the objects of a JSON document by dataclasses, and convert between the two.

A field's type says what JSON may hold: a dataclass or TypedDict is an object, `tuple[X, ...]` an
array, `Mapping` an object with any keys, `Literal` one of some strings. `Annotated[X, Schema(...)]`
adds what a type can't say. `tests/manifest_reference.py` generates the JSON schema and the
TypeScript types from the same description.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Schema:
    """A description of a value and the keywords of JSON Schema (draft 7) that limit it.

    Attributes:
        omit_default: the key is absent from the document where the field has its default.
    """

    def __init__(
        self, description: str = "", /, *, omit_default: bool = False, **keywords: Any
    ) -> None:
        self.description = description
        self.omit_default = omit_default
        self.keywords = keywords


@functools.cache
def fields(record: type) -> Mapping[str, Any]:
    """Map name → type of a dataclass's or TypedDict's fields, with annotations, in their order."""
    hints = get_type_hints(record, include_extras=True)
    if dataclasses.is_dataclass(record):
        return {field.name: hints[field.name] for field in dataclasses.fields(record)}
    return hints


def schemas(kind: Any) -> tuple[Schema, ...]:
    """Return the `Schema`s that annotate a type."""
    if get_origin(kind) is not Annotated:
        return ()
    return tuple(one for one in kind.__metadata__ if isinstance(one, Schema))


def plain(kind: Any) -> Any:
    """Return the type without its annotations."""
    return kind.__origin__ if get_origin(kind) is Annotated else kind


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type alone."""
    kind = plain(kind)
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def omits_default(kind: Any) -> bool:
    """Return whether the key is absent where a field of this type has its default."""
    return any(one.omit_default for one in schemas(kind))


def from_json(kind: type[T], value: Mapping[str, Any]) -> T:
    """Make the dataclass from a validated object; keys that are not its fields are left out."""
    return _from_json(kind, value)


def _from_json(kind: Any, value: Any) -> Any:
    kind = plain(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        given = {name: of for name, of in fields(kind).items() if name in value}
        return kind(**{name: _from_json(of, value[name]) for name, of in given.items()})
    if get_origin(kind) is tuple:
        return tuple(_from_json(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is Mapping:
        return {key: _from_json(get_args(kind)[1], item) for key, item in value.items()}
    return value


def to_json(record: Any) -> dict[str, Any]:
    """Make the JSON object of a dataclass, its keys in the order of the fields."""
    found = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not (omits_default(fields(type(record))[field.name]) and value == _default(field)):
            found[field.name] = _to_json(value)
    return found


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
