"""Read fields of an ONNX file from its bytes.

This needs neither `onnx`, which is slow to import, nor the weights, which are skipped. A protobuf
message is a sequence of fields: each has a number, a kind, and a value or bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlmport.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of a field
# Numbers of fields in onnx.proto.
GRAPH = 7  # of a model
NODE, INITIALIZER = 1, 5  # of a graph
INPUT, OP_TYPE, ATTRIBUTE = 1, 4, 5  # of a node
NAME, WHOLE = 1, 3  # of an attribute: `name`, `i`
DIMS, TENSOR_NAME = 1, 8  # of a tensor

LOOK_UPS = {b"Gather": b"axis", b"GatherBlockQuantized": b"gather_axis"}


class NoProtobufError(ValueError):
    """Bytes that are not a complete protobuf message."""


def varint(data: mmap.mmap | bytes, at: int, end: int) -> tuple[int, int]:
    """Decode a number in groups of seven bits, lowest first; return it and its end."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise NoProtobufError("it ends within a number" if at >= end else "its bytes are not protobuf")


class Field(NamedTuple):
    """One field: number and kind, the value of a whole number, start and end of its bytes."""

    number: int
    kind: int
    value: int
    start: int
    end: int


def fields(data: mmap.mmap | bytes, at: int, end: int) -> Iterator[Field]:
    """Yield the fields of a message. Raises NoProtobufError."""
    while at < end:
        tag, at = varint(data, at, end)
        kind, value, start = tag & 7, 0, at
        if kind == VARINT:
            value, at = varint(data, at, end)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            length, start = varint(data, at, end)
            at = start + length
        else:
            raise NoProtobufError("its bytes are not protobuf")
        if at > end:
            raise NoProtobufError(f"it ends {at - end} bytes too soon")
        yield Field(tag >> 3, kind, value, start, at)


def table_rows(path: Path, ids: str) -> int | None:
    """Return the number of rows of the table in which a graph looks up its input `ids`.

    Of several tables, the smallest counts. None if there is no table, as in a graph that changes
    the ids first.

    Raises BundleError for a file that is not ONNX.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _table_rows(data, ids.encode())
    except (NoProtobufError, OSError, ValueError) as error:
        raise BundleError(
            f"{path}: not a complete ONNX graph: {error}",
            hint="download or export it again",
            code="bundle.unreadable",
        ) from error


def _table_rows(data: mmap.mmap, ids: bytes) -> int | None:
    tables: dict[bytes, int] = {}  # name → the axis that is looked up
    dims: dict[bytes, list[int]] = {}
    for graph in fields(data, 0, len(data)):
        if graph.number != GRAPH:
            continue
        for field in fields(data, graph.start, graph.end):
            if field.number == NODE:
                tables |= _look_up(data, field, ids)
            elif field.number == INITIALIZER:
                name, sizes = _tensor(data, field)
                dims[name] = sizes
    rows = [
        dims[name][axis] for name, axis in tables.items() if -1 < axis < len(dims.get(name, ()))
    ]
    return min(rows, default=None)


def _look_up(data: mmap.mmap, node: Field, ids: bytes) -> dict[bytes, int]:
    """The table of a node that looks up `ids`, and along which axis; else nothing."""
    inputs, operator, axes = [], b"", {}
    for field in fields(data, node.start, node.end):
        text = data[field.start : field.end] if field.number in (INPUT, OP_TYPE) else b""
        if field.number == INPUT:
            inputs.append(text)
        elif field.number == OP_TYPE:
            operator = text
        elif field.number == ATTRIBUTE:
            parts = {part.number: part for part in fields(data, field.start, field.end)}
            if NAME in parts and WHOLE in parts:
                axes[data[parts[NAME].start : parts[NAME].end]] = parts[WHOLE].value
    if operator not in LOOK_UPS or inputs[1:2] != [ids]:
        return {}
    return {inputs[0]: axes.get(LOOK_UPS[operator], 0)}


def _tensor(data: mmap.mmap, tensor: Field) -> tuple[bytes, list[int]]:
    """A tensor's name and dims, which are packed into one field or have one each."""
    name, sizes = b"", []
    for field in fields(data, tensor.start, tensor.end):
        if field.number == TENSOR_NAME:
            name = data[field.start : field.end]
        elif field.number == DIMS and field.kind == BYTES:
            at = field.start
            while at < field.end:
                size, at = varint(data, at, field.end)
                sizes.append(size)
        elif field.number == DIMS:
            sizes.append(field.value)
    return name, sizes
