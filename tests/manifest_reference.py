"""Write the JSON schema and the TypeScript types of vlmport.json from its dataclasses.

python -m tests.manifest_reference [--check]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin, is_typeddict

from vlmport.bundle import manifest
from vlmport.bundle.manifest_file import FORMAT, VERSION
from vlmport.bundle.records import alternatives, fields, omits_default, plain, schemas

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "src/vlmport/bundle/vlmport.schema.json"
WEB_SCHEMA = ROOT / "web/src/bundle/vlmport.schema.json"
TYPES = ROOT / "web/src/bundle/manifest-types.ts"
TITLE = f"vlmport.json, the manifest of a vlmport bundle, version {VERSION}"
HEAD = {"format": {"const": FORMAT}, "version": {"type": "integer", "minimum": 1}}
SCALARS = {
    str: ("string", "string"),
    bool: ("boolean", "boolean"),
    int: ("integer", "number"),
    float: ("number", "number"),
    type(None): ("null", "null"),
}
# Types that TypeScript has a name for, other than objects.
NAMED = {"ImageOptions": manifest.ImageOptions}


# The JSON schema


def schema() -> dict[str, Any]:
    """The schema of the whole document, of draft 7."""
    found = record_schema(manifest.Manifest)
    found["required"] = [*HEAD, *found["required"]]
    found["properties"] = HEAD | found["properties"]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": TITLE} | found


def schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a type: what its annotations say, and the type's own."""
    found = {}
    for one in alternatives(kind):
        own = own_schema(plain(one))
        if "type" in found:
            own["type"] = [found["type"], own["type"]]
        found |= own
    described = ""
    for one in schemas(kind):
        described = one.description or described
        for keyword, value in one.keywords.items():
            found[keyword] = schema_of(value) if get_origin(value) is Annotated else value
    return ({"description": described} if described else {}) | found


def own_schema(kind: Any) -> dict[str, Any]:
    if kind in SCALARS:
        return {"type": SCALARS[kind][0]}
    if kind is Any:
        return {}
    if is_record(kind):
        return record_schema(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (tuple, list):
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin not in (Mapping, dict):
        raise TypeError(f"{kind}: JSON has no such type")
    key, value = schema_of(arguments[0]), schema_of(arguments[1])
    if "pattern" in key:
        named = {"patternProperties": {key["pattern"]: value}}
        return {"type": "object", "additionalProperties": False} | named
    return {"type": "object"} | ({"additionalProperties": value} if value else {})


def record_schema(kind: type) -> dict[str, Any]:
    required = [name for name, of in fields(kind).items() if not may_be_absent(of)]
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": {name: schema_of(given(of)) for name, of in fields(kind).items()},
    }


def is_record(kind: Any) -> bool:
    return is_typeddict(kind) or dataclasses.is_dataclass(kind)


def may_be_absent(kind: Any) -> bool:
    return get_origin(kind) is NotRequired or omits_default(kind)


def given(kind: Any) -> Any:
    """The type of a field where it is not absent."""
    return get_args(kind)[0] if get_origin(kind) is NotRequired else kind


# The types of TypeScript


def types() -> str:
    """The module of interfaces, those that others are made of first."""
    records = list(dict.fromkeys(records_in(manifest.Manifest)))
    parts = [f"export type {name} = {type_of(kind, NAMED)};" for name, kind in NAMED.items()]
    return "\n\n".join(
        [
            "/**\n * The types of vlmport.json.\n *\n"
            " * Generated from vlmport/bundle/manifest.py: python -m tests.manifest_reference\n */",
            "import type { Json } from './schema.js';",
            *parts,
            *map(interface, records),
        ]
    )


def records_in(kind: Any) -> Iterator[type]:
    """The objects that a type is made of, the innermost first."""
    kind = plain(given(kind))
    if is_record(kind):
        for inner in fields(kind).values():
            yield from records_in(inner)
        yield kind
    else:
        for inner in get_args(kind) if get_origin(kind) is not Literal else ():
            yield from records_in(inner)


def interface(kind: type) -> str:
    lines = [doc(kind.__doc__ or "", ""), f"export interface {kind.__name__} {{"]
    if kind is manifest.Manifest:
        lines += [f"  readonly format: '{FORMAT}';", "  readonly version: number;"]
    for name, of in fields(kind).items():
        mark = "?" if may_be_absent(of) else ""
        if described := "".join(one.description for one in schemas(given(of))):
            lines.append(doc(described[0].upper() + described[1:] + ".", "  "))
        lines.append(f"  readonly {name}{mark}: {type_of(given(of))};")
    return "\n".join([*lines, "}"])


def doc(text: str, indent: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) == 1:
        return f"{indent}/** {lines[0]} */"
    return "\n".join(
        [f"{indent}/**", *(f"{indent} * {line}".rstrip() for line in lines), f"{indent} */"]
    )


def type_of(kind: Any, without: Mapping[str, Any] | None = None) -> str:
    """The TypeScript type, as prettier writes it."""
    kind = plain(kind)
    for name, named in NAMED.items():
        if kind == named and without is None:
            return name
    if len(options := alternatives(kind)) > 1:
        return " | ".join(type_of(one) for one in options)
    if kind in SCALARS:
        return SCALARS[kind][1]
    if kind is Any:
        return "Json"
    if is_record(kind):
        return kind.__name__
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(f"'{one}'" for one in arguments)
    if origin in (tuple, list):
        inner = type_of(arguments[0])
        return f"readonly {f'({inner})' if ' | ' in inner else inner}[]"
    return f"Readonly<Record<string, {type_of(arguments[1])}>>"


def files() -> dict[Path, str]:
    """Path → text of every generated file."""
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    return {SCHEMA: text, WEB_SCHEMA: text, TYPES: types() + "\n"}


def main() -> int:
    stale = [
        path
        for path, text in files().items()
        if not path.is_file() or path.read_text("utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is out of date: python -m tests.manifest_reference", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(files()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
