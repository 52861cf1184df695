"""Structure-aware damage: valid documents and files with something wrong in them, as strategies.

A mutated document is one that was valid before a few of its values were replaced by others of
another type or size, dropped, or moved: so it gets past the first check and into the code that
trusts it.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]  # of keys and indices, from the top of a document

HUGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 65_537, *HUGE, *(-one for one in HUGE))
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-45, 1e-320, 3.5e38, 1e308, 1e-308)
TEXTS = (
    "", " ", "\0", "a", "gelu", "float16", "../../etc/passwd", "/", "a/b", ".", "..", "con",
    "\ud800", "\udcff", "é", "日本語", "\U0001f600", "\n", "x" * 5000, "{{", "{% for %}", "nan",
)  # fmt: skip


def deep(levels: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner]
    return inner


def odd_values() -> st.SearchStrategy[Any]:
    """A JSON value that nobody asked for."""
    plain = (
        st.sampled_from((None, True, False, *NUMBERS, *FLOATS, *TEXTS))
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8)
    )
    return (
        plain
        | st.lists(plain, max_size=4)
        | st.dictionaries(st.sampled_from(TEXTS), plain, max_size=3)
        | st.just(deep(60))
    )


def places(document: Any, above: Path = ()) -> Iterator[Path]:
    """Every place in a document but its top."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:50])
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def parent_of(document: Any, place: Path) -> Any:
    for key in place[:-1]:
        document = document[key]
    return document


@st.composite
def mutated(draw: st.DrawFn, valid: Any, most: int = 3) -> Any:
    """`valid` with up to `most` of its values replaced, dropped, doubled or exchanged."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        found = list(places(document))
        if not found:
            return document
        place = draw(st.sampled_from(found))
        parent, key = parent_of(document, place), place[-1]
        kind = draw(st.sampled_from(("replace", "replace", "drop", "wrap", "swap", "near")))
        if kind == "drop":
            del parent[key]
        elif kind == "wrap":
            parent[key] = draw(st.sampled_from(([parent[key]], {"a": parent[key]}, [])))
        elif kind == "swap":
            other = draw(st.sampled_from(found))
            value = copy.deepcopy(parent_of(document, other)[other[-1]])
            parent[key] = value
        elif kind == "near" and isinstance(parent[key], int):
            parent[key] = parent[key] + draw(st.sampled_from((-2, -1, 1, 2)))
        else:
            parent[key] = draw(odd_values())
    return document


@st.composite
def still_valid(draw: st.DrawFn, valid: Any, is_valid: Callable[[Any], bool], most: int = 3) -> Any:
    """`valid` with up to `most` changes that a schema does not see, so that they get past it.

    Each section has the same chance, however much stands in it. A value is replaced by one of its
    own type, often by another of the document; keys are renamed to others, lists turned round. A
    change that the schema refuses is taken back.
    """
    document = copy.deepcopy(valid)
    found = list(places(valid))
    texts = sorted({key for place in found for key in place if isinstance(key, str)})
    texts += sorted(
        {value for place in found if isinstance(value := _at(valid, place), str) and value}
    )
    for _ in range(draw(st.integers(1, most))):
        section = draw(st.sampled_from(sorted(document)))
        below = [(section,), *((section, *place) for place in places(document[section]))]
        before = copy.deepcopy(document)
        _change(draw, document, draw(st.sampled_from(below)), texts)
        if not is_valid(document):
            document = before
    return document


def _at(document: Any, place: Path) -> Any:
    return parent_of(document, place)[place[-1]]


def _change(draw: st.DrawFn, document: Any, place: Path, texts: list[str]) -> None:
    """Another value of the same type at a place, or another key for it."""
    parent, key = parent_of(document, place), place[-1]
    value = parent[key]
    if isinstance(parent, dict) and draw(st.integers(0, 5)) == 0:
        del parent[key]
        if draw(st.booleans()):
            parent[draw(st.sampled_from(texts))] = value
    elif isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        near = st.sampled_from((value - 1, value + 1, 2 * value, value // 2))
        parent[key] = draw(near | st.sampled_from(NUMBERS) | st.integers(0, 1000))
    elif isinstance(value, float):
        parent[key] = draw(st.sampled_from(FLOATS) | st.floats(-1e6, 1e6))
    elif isinstance(value, str):
        parent[key] = draw(st.sampled_from(texts) | st.sampled_from(TEXTS))
    elif isinstance(value, list):
        turned = (value[::-1], value[1:], value[:-1], value + value, [], value * 40)
        parent[key] = draw(st.sampled_from(turned))
    elif isinstance(value, dict):
        parent[key] = {} if draw(st.booleans()) else dict(list(value.items())[:1])


def written(document: Any) -> bytes:
    """As Python writes it: lone surrogates are escaped, numbers may be thousands of digits long."""
    return json.dumps(document).encode()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes cut, flipped, doubled, or with others put in."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "remove", "repeat", "number")))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip":
            data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "repeat":
            length = draw(st.integers(1, 64))
            data = data[:at] + data[at : at + length] * draw(st.integers(2, 20)) + data[at:]
        else:
            order, value = draw(st.sampled_from("<>")), draw(st.sampled_from((0, 2**31, 2**32 - 1)))
            data = data[:at] + struct.pack(f"{order}I", value) + data[at + 4 :]
    return data


@st.composite
def json_texts(draw: st.DrawFn, valid: Any) -> bytes:
    """A document with odd values, or its text with what JSON does not allow or say."""
    data = written(draw(mutated(valid)))
    spoil: Callable[[bytes], bytes] = draw(
        st.sampled_from(
            (
                lambda data: data,
                lambda data: data,
                lambda data: data,
                lambda data: data.replace(b": 1", b": NaN", 1),
                lambda data: data.replace(b": 0", b": -Infinity", 1),
                lambda data: data.replace(b"{", b'{"model_type": 1, "model_type": 2, ', 1),
                lambda data: data.decode().encode("utf-16"),
                lambda data: b"\xef\xbb\xbf" + data,
                lambda data: b"[" * 100_000 + data,
                lambda data: b'{"a":' * 50_000 + data,
                lambda data: data.replace(b"a", b"\xff", 1),
            )
        )
    )
    data = spoil(data)
    return draw(damaged(data)) if draw(st.integers(0, 7)) == 0 else data
