"""checkpoint → family → component graphs → bundle, all at once or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from vlmport import __version__
from vlmport.builtin import builtin_folder
from vlmport.bundle import (
    ANY,
    DEFAULT_PRECISIONS,
    SUFFIXES,
    Bundle,
    Manifest,
    Variant,
    hash_folder,
    write_manifest,
)
from vlmport.checkpoint import Checkpoint, locate_adapter
from vlmport.errors import ExportError, VlmportError
from vlmport.export.assign import Assignment
from vlmport.export.card import write_card
from vlmport.export.files import write_hub_files
from vlmport.export.folder import atomic_folder, check_space, check_target
from vlmport.export.golden import golden_input, record
from vlmport.export.soundness import check_float16, check_prompt
from vlmport.families import family_of
from vlmport.families.base import Family
from vlmport.graph.builder import GraphBuilder, to_model
from vlmport.graph.precision import PRECISIONS, Precision, parse_precisions
from vlmport.graph.weights import Weight

# A graph with more weights than this keeps them in a file beside it.
INLINE_BYTES = 16 * 1024 * 1024
# Browsers hold less than 2 GB in one buffer, so external data is split below that.
DATA_FILE_BYTES = 2_000_000_000
# Shape constants must stay in the graph: ONNX Runtime refuses them in external files.
EXTERNAL_THRESHOLD = 1024

# Device → the precisions that 'auto' prefers there, best first, of each component. The 8-bit
# kernels are fastest for many rows (a picture's patches), the 4-bit ones for one (a decode step).
# WASM unpacks 4-bit matrices anew in every call; WebGPU has no 8-bit activations.
MANY_ROWS, ONE_ROW = ("q8", "q4", "fp32"), ("q4", "q8", "fp32")
PREFERRED: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"vision_encoder": MANY_ROWS, "*": ONE_ROW},
    "cuda": {"*": ("fp16", "fp32")},
    "webgpu": {"*": ("q4", "fp32")},
    "wasm": {"*": ("q8", "fp32")},
}

# done bytes, total bytes, what is being written
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """One ONNX file to write."""

    component: str
    precision: str
    file: str
    model: ir.Model

    @property
    def weight_bytes(self) -> int:
        """Bytes of what is made from the checkpoint; constants of the graph don't count."""
        values = self.model.graph.initializers.values()
        return sum(_nbytes(value) for value in values if isinstance(value, Weight))


def export(
    source: str | Path,
    out: str | Path,
    *,
    precisions: str | Sequence[str] = DEFAULT_PRECISIONS,
    adapter: str | Path | None = None,
    force: bool = False,
    revision: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint folder, Hub id or built-in model to a bundle in `out`.

    Args:
        precisions: names, or one string with commas: fp32, fp16, q8 (or int8), q4, q4f16.
        adapter: a PEFT folder whose LoRA is merged into the weights.
        force: overwrite a bundle that is there.
        revision: branch, tag or commit of a Hub id.
        name: the bundle's name, by default that of the checkpoint.
        progress: called with (done bytes, total bytes, file being written).

    Raises:
        SourceError, ConfigError, WeightError, AdapterError, TokenizerError: a bad checkpoint.
        ExportError: `out` exists, an unknown precision, a full disk.
        In each case `out` is left as it was.
    """
    chosen = parse_precisions(precisions)
    out = Path(out).expanduser().resolve()  # through links, and '.' is a folder with a name
    check_target(out, force=force)
    checkpoint = Checkpoint.open(builtin_folder(source) or source, revision=revision)
    family = family_of(checkpoint)
    adapter_folder = None if adapter is None else locate_adapter(adapter)
    with atomic_folder(out, force=force) as folder:
        meter = Meter(progress)
        jobs = _plan(family, checkpoint, adapter_folder, chosen, meter)
        check_space(out, meter.total)
        for job in jobs:
            meter.what = job.file
            _write_model(job, folder)
        label = name or _default_name(source, checkpoint)
        _write_manifest(family, checkpoint, jobs, folder, label)
    return Bundle.open(out)


class Meter:
    """Counts bytes as weights are converted."""

    def __init__(self, progress: Progress | None):
        self.progress, self.done, self.total, self.what = progress, 0, 0, ""

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total, self.what)


def _plan(
    family: Family,
    checkpoint: Checkpoint,
    adapter: Path | None,
    precisions: tuple[Precision, ...],
    meter: Meter,
) -> list[Job]:
    """All graphs, each weight with its tensor; nothing is written before every one has."""
    assignment = Assignment(family.weights(checkpoint, adapter))

    def job(component: str, precision: str, suffix: str, builder: GraphBuilder) -> Job:
        assignment.assign(builder.graph, meter.add)
        file = f"onnx/{component}{suffix}.onnx"
        return Job(component, precision, file, to_model(builder, __version__))

    jobs = [job(name, ANY, "", graph) for name, graph in family.fixed_graphs().items()]
    for precision in precisions:
        for name, graph in family.graphs(precision).items():
            jobs.append(job(name, precision.name, precision.suffix, graph))
    assignment.finish(family.is_unused)
    meter.total = sum(job.weight_bytes for job in jobs)
    return jobs


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None, value.name
    return value.const_value.nbytes


def _write_model(job: Job, folder: Path) -> None:
    """Save and check one graph; weights past INLINE_BYTES go to files beside it."""
    path = folder / job.file
    path.parent.mkdir(exist_ok=True)
    try:
        if job.weight_bytes > INLINE_BYTES:
            _move_weights_out(job.model.graph, path)
        ir.save(job.model, path)
    except ir.serde.SerdeError as error:  # wraps what a weight raised when it was read
        raise _user_error(error) from error
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        line = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"{job.file}: not a valid ONNX graph: {line}", hint="please report this"
        ) from error


def _move_weights_out(graph: ir.Graph, path: Path) -> None:
    """Write large initializers to `<path>_data`, `<path>_data_1`, …, the Hub's names for parts.

    A part holds up to DATA_FILE_BYTES, or one tensor that is larger by itself.
    """
    parts: list[list[ir.Value]] = [[]]
    room = DATA_FILE_BYTES
    for value in graph.initializers.values():
        if (size := _nbytes(value)) <= EXTERNAL_THRESHOLD:
            continue
        if parts[-1] and size > room:
            parts.append([])
            room = DATA_FILE_BYTES
        parts[-1].append(value)
        room -= size
    for number, values in enumerate(part for part in parts if part):
        name = data_file(path.name, number)
        tensors = [value.const_value for value in values if value.const_value is not None]
        moved = ir.external_data.convert_tensors_to_external(tensors, path.parent, name)
        for value, tensor in zip(values, moved, strict=True):
            value.const_value = tensor


def data_file(graph: str, number: int) -> str:
    """A graph's external data file, as transformers.js numbers them."""
    return f"{graph}_data_{number}" if number else f"{graph}_data"


def _data_files(folder: Path, graph: str) -> tuple[str, ...]:
    """The external data files of a graph that was written."""
    names = (data_file(graph, number) for number in itertools.count())
    return tuple(itertools.takewhile(lambda name: (folder / name).is_file(), names))


def _user_error(error: BaseException) -> BaseException:
    """The VlmportError that another error was raised from, or that other one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, VlmportError):
        cause = cause.__cause__
    return cause or error


def _write_manifest(
    family: Family, checkpoint: Checkpoint, jobs: list[Job], folder: Path, name: str
) -> None:
    """The files around the graphs, the golden probe (which runs every graph), the manifest."""
    components: dict[str, dict[str, Variant]] = {}
    for job in jobs:
        variant = Variant(job.file, _data_files(folder, job.file))
        components.setdefault(job.component, {})[job.precision] = variant
    precisions = [p for p in PRECISIONS if any(job.precision == p for job in jobs)]
    auto = _auto(components, precisions)
    hub = family.hub_files()
    write_hub_files(checkpoint, hub, folder, _transformers_js(components, auto))
    forms = {p: _describe(p, folder, components) for p in precisions}
    write_card(checkpoint, hub, folder, name=name, forms=forms, messages=family.prompt.caption)
    manifest = Manifest(
        producer=f"vlmport {__version__}",
        name=name,
        family=family.name,
        components=components,
        auto=auto,
        files=hash_folder(folder),
        dims=family.dims,
        cache=family.cache,
        prompt=family.prompt,
        generation=family.generation,
        pixels=family.pixels,
        golden=golden_input(family.image_tokens),
    )
    write_manifest(folder, manifest)
    bundle = Bundle.open(folder)
    check_prompt(bundle)
    for precision in precisions:
        if PRECISIONS[precision].is_half:
            check_float16(bundle, precision)
    write_manifest(folder, record(bundle, precisions))


def _auto(
    components: Mapping[str, Mapping[str, Variant]], precisions: list[str]
) -> dict[str, dict[str, str]]:
    """Device → component → precision, of those that were exported."""

    def best(component: str, order: Mapping[str, tuple[str, ...]]) -> str:
        if ANY in components[component]:
            return ANY
        wanted = [*order.get(component, order["*"]), *SUFFIXES]
        return next(precision for precision in wanted if precision in precisions)

    return {
        device: {component: best(component, order) for component in components}
        for device, order in PREFERRED.items()
    }


def _transformers_js(
    components: Mapping[str, Mapping[str, Variant]], auto: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """What that client reads of config.json: external data files, and dtypes by device."""
    variants = [variant for forms in components.values() for variant in forms.values()]
    external = {Path(v.model).name: len(v.data) for v in variants if v.data}
    settings: dict[str, Any] = {"use_external_data_format": external} if external else {}
    by_device = {
        device: {"dtype": {name: p for name, p in choice.items() if p != ANY}}
        for device, choice in auto.items()
    }
    # For a device without a choice of its own, and all that the client's progress bar reads.
    settings |= by_device["wasm"]
    settings["device_config"] = by_device
    return settings


def _describe(precision: str, folder: Path, components: Mapping[str, Mapping[str, Variant]]) -> str:
    """One line of the model card: what the precision is, and how many megabytes to fetch."""
    files = [
        file
        for forms in components.values()
        for one, variant in forms.items()
        if one in (precision, ANY)
        for file in (variant.model, *variant.data)
    ]
    size = sum((folder / file).stat().st_size for file in files)
    return f"{PRECISIONS[precision].meaning}; {size / 1e6:.1f} MB"


def _default_name(source: str | Path, checkpoint: Checkpoint) -> str:
    """The Hub id as it was given, or the folder's name."""
    local = Path(source).expanduser().exists()
    return checkpoint.folder.resolve().name if local else str(source)
