"""Write ONNX files one after another, with the weights streamed into them or into data files."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

from vlmport.errors import ExportError, VlmportError
from vlmport.graph.parameters import Weight

# A graph with more weights than this keeps them in a data file.
INLINE_BYTES = 16 * 1024 * 1024
# Browsers hold less than 2 GB in one buffer, so a data file holds no more, unless it is one tensor
# that is larger by itself.
DATA_FILE_BYTES = 2_000_000_000
# The maximum number of data files of a graph that transformers.js reads.
DATA_FILES = 100
UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
UNITS |= {"KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}
# Shape constants must stay in the graph: ONNX Runtime refuses them in external files.
EXTERNAL_THRESHOLD = 1024


@dataclass(frozen=True)
class Job:
    """One ONNX file to write.

    Attributes:
        owner: the job, written before, whose data files hold the weights of the same names.
        is_shared: whether this is such an owner; even few weights of it are in data files.
    """

    component: str
    precision: str
    file: str
    model: ir.Model
    owner: Job | None = None
    is_shared: bool = False

    @property
    def weight_bytes(self) -> int:
        """Number of bytes made from the checkpoint; constants of the graph don't count."""
        values = self.model.graph.initializers.values()
        own = [value for value in values if isinstance(value, Weight) and not self.borrows(value)]
        return sum(_nbytes(value) for value in own)

    def borrows(self, value: ir.Value) -> bool:
        """Return whether the owner stores this value. Small ones stay in each graph."""
        if self.owner is None or _nbytes(value) <= EXTERNAL_THRESHOLD:
            return False
        theirs = self.owner.model.graph.initializers.get(value.name or "")
        if theirs is None:
            return False
        assert (theirs.dtype, theirs.shape) == (value.dtype, value.shape), value.name
        return True


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None, value.name
    return value.const_value.nbytes


def parse_size(text: str | int) -> int:
    """Parse the maximum size of a data file: '500MB', '2GB' or a number, as in Hugging Face.

    Raises ExportError for other texts, and for more than DATA_FILE_BYTES.
    """
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) ?([A-Za-z]*)", str(text).strip())
    number, unit = found.groups() if found else ("0", "")
    size = int(float(number) * UNITS.get(unit.upper(), 0))
    if size < 1:
        raise ExportError(
            f"size {str(text)[:40]!r}: expected a number of bytes, such as 500MB",
            hint="units are KB, MB, GB, KiB, MiB and GiB",
            code="option.wrong-value",
        )
    if size > DATA_FILE_BYTES:
        raise ExportError(
            f"size {str(text)[:40]!r}: the maximum is {DATA_FILE_BYTES} bytes (2GB), "
            "since browsers hold no larger file in one piece",
            hint="leave out the size: the maximum is the default",
            code="option.wrong-value",
        )
    return size


def write_model(job: Job, folder: Path, room: int | None = None) -> None:
    """Save and check one graph; weights of more than INLINE_BYTES, or `room`, go to data files.

    Args:
        room: maximum bytes of a data file; None for DATA_FILE_BYTES.

    Raises ExportError if that needs more than DATA_FILES files.
    """
    path = folder / job.file
    path.parent.mkdir(exist_ok=True)
    room = room or DATA_FILE_BYTES
    try:
        if job.owner is not None:
            _borrow_weights(job, folder)
        if job.is_shared or job.weight_bytes > min(room, INLINE_BYTES):
            _move_weights_out(job.model.graph, path, room)
        ir.save(job.model, path)
    except ir.serde.SerdeError as error:  # wraps what a weight raised when it was read
        raise _user_error(error) from error
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        line = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"{job.file}: not a valid ONNX graph: {line}",
            hint="please report this",
            code="export.invalid-graph",
        ) from error


def _borrow_weights(job: Job, folder: Path) -> None:
    """Point the graph's weights to its owner's data files, which are in its folder or below.

    ONNX Runtime follows no path upwards.
    """
    assert job.owner is not None
    here = PurePosixPath(job.file).parent
    below = PurePosixPath(job.owner.file).parent.relative_to(here)
    for value in job.model.graph.initializers.values():
        if not job.borrows(value):
            continue
        stored = job.owner.model.graph.initializers[value.name or ""].const_value
        assert isinstance(stored, ir.ExternalTensor), value.name
        value.const_value = ir.ExternalTensor(
            str(below / stored.location),
            stored.offset,
            stored.length,
            stored.dtype,
            shape=stored.shape,
            name=stored.name,
            base_dir=folder / here,
        )


def _move_weights_out(graph: ir.Graph, path: Path, most: int) -> None:
    """Write large initializers to `<path>_data`, `<path>_data_1`, …, the Hub's names for parts.

    A part holds up to `most` bytes, or one tensor that is larger by itself.
    """
    parts: list[list[ir.Value]] = [[]]
    room = most
    large = [one for one in graph.initializers.values() if _nbytes(one) > EXTERNAL_THRESHOLD]
    for value in large:
        size = _nbytes(value)
        if parts[-1] and size > room:
            parts.append([])
            room = most
        parts[-1].append(value)
        room -= size
    if len(parts) > DATA_FILES:
        raise ExportError(
            f"{path.name}: {len(parts)} files of weights, clients read up to {DATA_FILES}",
            hint="allow larger files"
            if most < DATA_FILE_BYTES
            else "choose a precision of fewer bits: browsers can't hold larger files",
            code="export.too-many-files",
        )
    for number, values in enumerate(part for part in parts if part):
        name = data_file(path.name, number)
        tensors = [value.const_value for value in values if value.const_value is not None]
        moved = ir.external_data.convert_tensors_to_external(tensors, path.parent, name)
        for value, tensor in zip(values, moved, strict=True):
            value.const_value = tensor


def data_file(graph: str, number: int) -> str:
    """A graph's external data file, as transformers.js numbers them."""
    return f"{graph}_data_{number}" if number else f"{graph}_data"


def data_files(folder: Path, job: Job) -> tuple[str, ...]:
    """The external data files of a graph that was written, its owner's among them."""
    names = (data_file(job.file, number) for number in itertools.count())
    own = itertools.takewhile(lambda name: (folder / name).is_file(), names)
    return (*own, *(data_files(folder, job.owner) if job.owner else ()))


def _user_error(error: BaseException) -> BaseException:
    """The VlmportError that another error was raised from, or that other one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, VlmportError):
        cause = cause.__cause__
    return cause or error
