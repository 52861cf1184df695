"""Read a JSON object from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmport.errors import ConfigError, VlmportError
from vlmport.files.foreign import check_file

NOT_JSON = "source.not-json"


def load_json(
    path: Path, *, error: type[VlmportError] = ConfigError, hint: str | None = None
) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises `error` when the file is missing, unreadable, not JSON (with line and column; NaN and
    Infinity are not JSON), nested too deep, not an object, or contains half a surrogate pair.
    """
    hint = hint or "check that the download is complete"
    check_file(path, error, hint=hint, what="JSON")
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data))
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # perhaps half of a surrogate pair, which UTF-8 can't encode
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as cause:
        raise error(
            f"{path}: {cause.strerror or cause}", hint=hint, code="source.unreadable"
        ) from cause
    except json.JSONDecodeError as cause:
        place = f"line {cause.lineno} column {cause.colno}"
        raise error(
            f"{path}: not JSON at {place}: {cause.msg}", hint=hint, code=NOT_JSON
        ) from cause
    except RecursionError:
        raise error(
            f"{path}: not JSON that can be read: nested too deep", hint=hint, code=NOT_JSON
        ) from None
    except ValueError as cause:  # not text, NaN, or a number of thousands of digits
        raise error(f"{path}: not JSON: {cause}", hint=hint, code=NOT_JSON) from cause
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {_kind(value)}", hint=hint, code=NOT_JSON)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else kinds.get(type(value), "a number")
