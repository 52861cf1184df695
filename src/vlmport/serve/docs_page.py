"""/docs: the paths and the fields of their bodies, as a page without scripts.

FastAPI's own page loads its scripts from a host on the internet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}"
    "td,th{border:1px solid #8886;padding:.2rem .6rem;text-align:left;vertical-align:top}"
    "code{font-size:.95em}h2{margin-top:2rem}:root{color-scheme:light dark}"
)


def docs_page(document: Mapping[str, Any]) -> str:
    """Write the page from an OpenAPI document."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return "".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style><h1>{title}</h1>",
            f"<p>{escape(document['info']['description'])} ",
            '<a href="/openapi.json">openapi.json</a> has all of it for programs.</p>',
            *_operations(document),
            "<h2>Objects</h2>",
            *_objects(document["components"]["schemas"]),
            "</html>",
        ]
    )


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description') or operation['summary'])}</p>"
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                yield f"<p>Body: <code>{escape(kind)}</code>, {_type(body['schema'])}</p>"


def _objects(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3>'
        yield f"<p>{escape(schema.get('description', '').split(chr(10))[0])}</p><table>"
        needed = schema.get("required", ())
        for field, kind in schema.get("properties", {}).items():
            mark = " (required)" if field in needed else ""
            yield f"<tr><td><code>{escape(field)}</code>{mark}<td>{_type(kind)}"
        yield "</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """Write a type in words, with links to objects."""
    if reference := schema.get("$ref"):
        name = escape(reference.rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            found = [_type(one) for one in schema[several] if one.get("type") != "null"]
            return " or ".join(found) or "null"
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(str(one))}</code>" for one in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    words = escape(str(schema.get("type", "any value")))
    limits = {"minimum": "from", "maximum": "to", "pattern": "matching"}
    shown = [f"{word} {escape(str(schema[key]))}" for key, word in limits.items() if key in schema]
    return " ".join([words, *shown])
