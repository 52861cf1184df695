"""Validate bodies by the models of the openai package, without their leniency.

The package makes objects of any JSON. Here a field that its type requires must be there, with a
value of its type; and a body has no fields but those that it knows, or those in OURS.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

Kind = TypeVar("Kind", bound=BaseModel)
# The first is in the usage of /v1/responses, where OpenAI counts none, the second in a model.
OURS = frozenset({"image_tokens", "vlmport"})


def validated(kind: type[Kind], body: Any) -> Kind:
    """Return the body as an object of the package. Raises where it is not exactly that."""
    found = kind.model_validate(body)
    extras = list(_extras(found))
    assert not extras, extras
    return found


def _extras(value: Any, place: str = "") -> Any:
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in (value.model_extra or {}) if name not in OURS)
        for name in value.model_fields_set:
            yield from _extras(getattr(value, name, None), f"{place}.{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _extras(one, f"{place}[{number}]")
