"""Describe an ONNX file without reading its weights.

The file is mapped into memory, and the bytes of its weights are skipped, however many they are. A
protobuf field is a number, a kind and bytes, so fields can be skipped without parsing them.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from vlmport.errors import BundleError, some_names
from vlmport.files.foreign import check_file
from vlmport.files.onnx_bytes import BYTES, NoProtobufError, fields

# Fields of onnx.proto that lead to weights: message → field → message, or None for the weights.
TENSOR: dict[int, Any] = dict.fromkeys((4, 5, 6, 7, 9, 10, 11))  # float_data … raw_data …
GRAPH: dict[int, Any] = {5: TENSOR}  # initializer
MODEL: dict[int, Any] = {7: GRAPH}  # graph
HINT = "download or export it again"


@dataclass(frozen=True)
class Port:
    """An input or output: its name, and its type as text, such as 'float[batch_size, 3]'."""

    name: str
    type: str

    def __str__(self) -> str:
        return f"{self.name} {self.type}"


@dataclass(frozen=True)
class ExternalFile:
    """A file of external weights.

    Attributes:
        needed: bytes up to the end of the last weight in it.
        size: its size in bytes; None if it is missing.
        outside: whether its path is outside of the graph's folder.
    """

    name: str
    needed: int
    size: int | None
    outside: bool

    @property
    def problem(self) -> str | None:
        if self.outside:
            return f"{self.name}: outside of the graph's folder"
        if self.size is None:
            return f"{self.name}: missing"
        if self.size < self.needed:
            return f"{self.name}: {self.size} bytes, the graph needs {self.needed}"
        return None


@dataclass(frozen=True)
class OnnxFile:
    """One graph.

    Attributes:
        opsets: domain → version; 'ai.onnx' for the nameless one.
        operators: domain → operator → count, subgraphs and functions included.
        weights: dtype → (tensors, bytes).
    """

    path: Path
    size: int
    ir_version: int
    producer: str
    opsets: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Mapping[str, Counter[str]]
    functions: tuple[str, ...]
    weights: Mapping[str, tuple[int, int]]
    external: tuple[ExternalFile, ...]
    metadata: Mapping[str, str]

    @property
    def total_size(self) -> int:
        """The bytes of the graph and its external files."""
        return self.size + sum(one.size or 0 for one in self.external)

    def check(self) -> None:
        """Raise BundleError if external files are missing or too short."""
        if problems := [one.problem for one in self.external if one.problem]:
            raise BundleError(
                f"{self.path}: its weights are incomplete: {'; '.join(problems)}",
                hint="download the external data too, under that name, into the graph's folder",
                code="bundle.missing-file",
            )


def read_onnx(path: Path) -> OnnxFile:
    """Read a graph without its weights. Raises BundleError for a damaged or other file."""
    model = read_model(path)
    graph = model.graph
    weights = [*_all_weights(graph)]
    fed = {value.name for value in graph.initializer}  # IR 3 lists weights as inputs too
    return OnnxFile(
        path=path,
        size=path.stat().st_size,
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets={_domain(one.domain): one.version for one in model.opset_import},
        inputs=tuple(port(value) for value in graph.input if value.name not in fed),
        outputs=tuple(port(value) for value in graph.output),
        operators=_count(model),
        functions=tuple(f"{_domain(one.domain)}:{one.name}" for one in model.functions),
        weights=_by_type(weights),
        external=tuple(_external(path.parent, weights)),
        metadata={one.key: one.value for one in model.metadata_props},
    )


def read_model(path: Path) -> onnx.ModelProto:
    """Read the model without its weights. Raises BundleError."""
    check_file(path, BundleError, hint=HINT, what="the graph")
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise BundleError(f"{path}: empty (0 bytes)", hint=HINT, code="bundle.unreadable")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                skimmed = _skim(data, 0, len(data), MODEL)
    except OSError as error:
        raise BundleError(
            f"{path}: {error.strerror or error}",
            hint="check that it is readable",
            code="bundle.unreadable",
        ) from error
    except NoProtobufError as error:
        raise _not_onnx(path, str(error)) from error
    try:
        model = onnx.ModelProto.FromString(skimmed)
    except DecodeError as error:
        raise _not_onnx(path, str(error)) from error
    if not model.HasField("graph") or not model.opset_import or model.ir_version < 1:
        absent = [
            name
            for name, there in (
                ("IR version", model.ir_version >= 1),
                ("graph", model.HasField("graph")),
                ("opset", model.opset_import),
            )
            if not there
        ]
        raise _not_onnx(path, f"no {', no '.join(absent)}")
    return model


def port(value: onnx.ValueInfoProto) -> Port:
    return Port(value.name, _type_text(value.type))


def _not_onnx(path: Path, why: str) -> BundleError:
    return BundleError(
        f"{path}: not a complete ONNX graph: {why}", hint=HINT, code="bundle.unreadable"
    )


def _skim(data: mmap.mmap, at: int, end: int, rules: Mapping[int, Any]) -> bytes:
    """Copy a message without the fields that the rules drop, at any depth that they name."""
    out = bytearray()
    for field in fields(data, at, end):
        inside = rules.get(field.number)
        if field.kind != BYTES or field.number not in rules:
            out += data[at : field.end]
        elif inside is not None:
            kept = _skim(data, field.start, field.end, inside)
            out += _as_varint(field.number << 3 | BYTES) + _as_varint(len(kept)) + kept
        at = field.end
    return bytes(out)


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _domain(name: str) -> str:
    return name or "ai.onnx"


def _type_text(kind: onnx.TypeProto) -> str:
    """Format a type, such as 'float[batch_size, 3]'; '?' is a size without a name."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        name = "sparse " * (which == "sparse_tensor_type") + type_name(tensor.elem_type)
        if not tensor.HasField("shape"):
            return f"{name} of any shape"
        return f"{name}[{', '.join(_dim_text(dim) for dim in tensor.shape.dim)}]"
    if which == "sequence_type":
        return f"sequence of {_type_text(kind.sequence_type.elem_type)}"
    if which == "optional_type":
        return f"optional {_type_text(kind.optional_type.elem_type)}"
    return "map" if which == "map_type" else "of no type"


def _dim_text(dim: onnx.TensorShapeProto.Dimension) -> str:
    which = dim.WhichOneof("value")
    return str(getattr(dim, which)) if which else "?"


def type_name(code: int) -> str:
    """Return a type's name, such as 'float16'; a file may contain a number without a name."""
    try:
        return onnx.TensorProto.DataType.Name(code).lower()
    except ValueError:
        return f"type {code}, unknown"


def _graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Yield the subgraphs of nodes: branches and loop bodies."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _graphs([node]):
            yield from _all_nodes(graph.node)


def _all_weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the initializers and the tensors of Constant nodes, also in subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        yield from (one.t for one in node.attribute if one.HasField("t"))
    for inner in _graphs(graph.node):
        yield from _all_weights(inner)


def _count(model: onnx.ModelProto) -> dict[str, Counter[str]]:
    counted: dict[str, Counter[str]] = {}
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for node in (node for body in bodies for node in _all_nodes(body)):
        counted.setdefault(_domain(node.domain), Counter())[node.op_type] += 1
    return dict(sorted(counted.items()))


def _by_type(weights: Iterable[onnx.TensorProto]) -> dict[str, tuple[int, int]]:
    counted: dict[str, tuple[int, int]] = {}
    for tensor in weights:
        name = type_name(tensor.data_type)
        count, size = counted.get(name, (0, 0))
        counted[name] = count + 1, size + _nbytes(tensor)
    return dict(sorted(counted.items(), key=lambda one: -one[1][1]))


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Compute a tensor's bytes from its type and dims; strings count as 0."""
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError):
        return 0
    return -(-prod(tensor.dims) * bits // 8)


def _external(folder: Path, weights: Iterable[onnx.TensorProto]) -> Iterator[ExternalFile]:
    needed: dict[str, int] = {}
    for tensor in weights:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {one.key: one.value for one in tensor.external_data}
        name = entries.get("location", "")
        end = _whole(entries.get("offset")) + (_whole(entries.get("length")) or _nbytes(tensor))
        needed[name] = max(needed.get(name, 0), end)
    for name, end in needed.items():
        yield ExternalFile(name, end, *_size_and_place(folder, name))


def _size_and_place(folder: Path, name: str) -> tuple[int | None, bool]:
    """Return the bytes of a file that a graph names, or None; and whether it is outside."""
    file = folder / name
    try:
        if not name or not file.resolve().is_relative_to(folder.resolve()):
            return None, True
        return file.stat().st_size if file.is_file() else None, False
    except (OSError, ValueError):  # a name that is not valid in the file system
        return None, False


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def find_onnx(folder: Path) -> list[Path]:
    """Find the ONNX files in a folder and its subfolders. Raises BundleError if there is none."""
    found = sorted(path for path in folder.rglob("*.onnx") if path.is_file())
    if not found:
        inside = sorted(path.name for path in folder.iterdir())
        raise BundleError(
            f"{folder}: neither a vlmport bundle (no vlmport.json) nor a folder with ONNX files; "
            f"it has {some_names(inside) or 'nothing'}",
            hint="`vlmport export SRC OUT` writes a bundle",
            code="bundle.no-manifest",
        )
    return found
