"""Export: checkpoint → family → component graphs → bundle, complete or not at all."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmport import __version__
from vlmport.builtin import builtin_folder, builtin_models
from vlmport.bundle import (
    ANY,
    DEFAULT_PRECISIONS,
    SUFFIXES,
    Bundle,
    Golden,
    Manifest,
    Variant,
    hash_folder,
    write_manifest,
)
from vlmport.bundle.layouts import HUB, LAYOUTS, ImageSize
from vlmport.checkpoint import Checkpoint, locate_adapter
from vlmport.errors import ExportError, ExportWarning, WeightError, did_you_mean, warn
from vlmport.exporter.assign import PAST_FLOAT16, Assignment
from vlmport.exporter.card import write_card
from vlmport.exporter.files import write_hub_files, write_json
from vlmport.exporter.folder import atomic_folder, check_space, check_target, recover
from vlmport.exporter.golden import golden_input, record
from vlmport.exporter.soundness import check_float16, check_prompt
from vlmport.exporter.token_ids import check_token_ids
from vlmport.exporter.writing import Job, data_files, parse_size, write_model
from vlmport.families import family_of
from vlmport.families.adapter_files import with_adapter_files
from vlmport.families.base import Family, Layout, SizedLayout
from vlmport.graph.builder import GraphBuilder, to_model
from vlmport.graph.precision import PRECISIONS, Precision, parse_precisions

# Device → the precisions that 'auto' prefers there, best first: those of components that compute
# many rows in a call (an image's patches), and those of the others (a decode step). The 8-bit
# kernels are fastest for many rows, the 4-bit ones for one. WASM unpacks 4-bit matrices in every
# call; WebGPU has no 8-bit activations.
Preferred = tuple[str, ...]
PREFERRED: Mapping[str, tuple[Preferred, Preferred]] = {
    "cpu": (("q8", "q4", "fp32"), ("q4", "q8", "fp32")),
    "cuda": (("fp16", "fp32"), ("fp16", "fp32")),
    "webgpu": (("q4", "fp32"), ("q4", "fp32")),
    "wasm": (("q8", "fp32"), ("q8", "fp32")),
}

# done bytes, total bytes, the file being written
Progress = Callable[[int, int, str], None]


def export(
    source: str | Path,
    out: str | Path,
    *,
    precisions: str | Sequence[str] | None = None,
    layout: str = HUB,
    image_size: str | ImageSize | None = None,
    max_shard_size: str | int | None = None,
    adapter: str | Path | None = None,
    ignore_weights: str | Sequence[str] = (),
    force: bool = False,
    revision: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint to a bundle: graphs, weights, tokenizer, manifest and model card.

        bundle = vlmport.export("my-finetune", "my-bundle")
        vlmport.export("org/name", "out", precisions="fp16", force=True)

    An export that fails leaves `out` as it was. PyTorch is not needed.

    Args:
        source: a checkpoint folder, a Hub id such as 'org/name', or a built-in name.
        out: the bundle's folder, which must not exist, or be empty, or be a bundle with `force`.
        precisions: names, or one string with commas, of 'fp32', 'fp16', 'q8' (or 'int8'), 'q4' and
            'q4f16'. None (default) is fp32, q8 and q4, without those that this model can't have:
            an ExportWarning says so. A precision that is named and can't be had is an error.
        layout: the form of the folder (default 'hub'); 'components', 'fused' and 'genai' for the
            families that have them.
        image_size: width and height in pixels, such as '672x672', for layouts that take images of
            one size only.
        max_shard_size: maximum size of a file of weights, such as '500MB'. None (default) is 2 GB,
            the most that browsers hold in one piece.
        adapter: a PEFT folder or Hub id, whose LoRA is merged into the weights.
        ignore_weights: patterns, such as 'model.talker.*', of tensors that the model does not need.
            They are left out, and the manifest and the model card name them. Without a pattern, a
            tensor that has no place in the model is an error.
        force: replace a bundle that exists (default False).
        revision: branch, tag or commit of a Hub id.
        name: the bundle's name; None takes that of the checkpoint.
        progress: called with (done bytes, total bytes, file being written).

    Returns:
        The bundle.

    Raises:
        SourceError, ConfigError, WeightError, AdapterError, TokenizerError: the checkpoint is not
            found, not supported or damaged.
        ExportError: `out` exists, an unknown precision or layout, an image size that the model or
            the layout does not take, a bad shard size, a full disk.
        OptionError: `ignore_weights` match nothing, or a tensor that the model needs.
    """
    chosen = parse_precisions(DEFAULT_PRECISIONS if precisions is None else precisions)
    room = None if max_shard_size is None else parse_size(max_shard_size)
    out = Path(out).expanduser().resolve()  # through links, and '.' is a folder with a name
    recover(out)
    check_target(out, force=force)
    checkpoint = Checkpoint.open(
        builtin_folder(source) or source, revision=revision, known=builtin_models()
    )
    family = family_of(checkpoint)
    adapter_folder = None if adapter is None else locate_adapter(adapter)
    if adapter_folder is not None:
        checkpoint, family = with_adapter_files(checkpoint, family, adapter_folder)
    size = None if image_size is None else ImageSize.parse(image_size)
    _layout(family, layout, size)  # reports an unknown one before any weight is read
    tensors = family.weights(checkpoint, adapter_folder)
    family = family.with_weights(tensors)
    form = _layout(family, layout, size)
    with atomic_folder(out, force=force) as folder:
        meter = Meter(progress)
        check_token_ids(checkpoint, family, form.hub_files())
        assignment = Assignment(tensors)
        jobs = _plan(family, form, assignment, chosen, meter)
        patterns = [ignore_weights] if isinstance(ignore_weights, str) else ignore_weights
        ignored = assignment.ignore(patterns)
        assignment.finish(family.is_unused)
        meter.total = sum(job.weight_bytes for job in jobs)
        check_space(out, meter.total)
        jobs = _write(jobs, folder, room, meter, may_lack=precisions is None)
        label = name or _default_name(source, checkpoint)
        manifest = _write_manifest(family, form, layout, checkpoint, jobs, folder, label, ignored)
        _try_out(Bundle(folder, manifest))
    return Bundle.open(out)


def _layout(family: Family, name: str, size: ImageSize | None) -> Layout:
    """Return the family's layout. Raises ExportError if it has none of this name or size."""
    layouts = family.layouts
    if name not in layouts:
        raise ExportError(
            f"layout {name!r} is not available for the family {family.name!r}"
            f"{did_you_mean(name, layouts)}",
            hint=f"its layouts are: {', '.join(layouts)}",
            code="layout.unknown",
        )
    layout = layouts[name]
    if isinstance(layout, SizedLayout):
        return layout.at(size or layout.default)
    if size is not None:
        raise ExportError(
            f"layout {name!r} does not take an image size",
            hint="leave out the image size; the graphs of this layout take images of any size",
            code="layout.wrong-image-size",
        )
    return layout


class Meter:
    """A count of the bytes of converted weights, for `progress`."""

    def __init__(self, progress: Progress | None):
        self.progress, self.done, self.total, self.what = progress, 0, 0, ""

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total, self.what)


def _plan(
    family: Family,
    layout: Layout,
    assignment: Assignment,
    precisions: tuple[Precision, ...],
    meter: Meter,
) -> list[Job]:
    """Plan all graphs, and assign to each weight its tensor if there is one."""
    jobs: dict[tuple[str, str], Job] = {}

    def add(component: str, precision: str, suffix: str, builder: GraphBuilder) -> None:
        assignment.assign(builder.graph, meter.add)
        owner = layout.shared.get(component)
        jobs[component, precision] = Job(
            component,
            precision,
            layout.path(component, suffix),
            to_model(builder, __version__),
            owner=None if owner is None else jobs[owner, precision],
            is_shared=component in layout.shared.values(),
        )

    for name, graph in layout.fixed_graphs().items():
        add(name, ANY, "", graph)
    for precision in precisions:
        for name, graph in layout.graphs(precision).items():
            add(name, precision.name, precision.suffix, graph)
    return list(jobs.values())


def _write(
    jobs: list[Job], folder: Path, room: int | None, meter: Meter, *, may_lack: bool
) -> list[Job]:
    """Write all graphs; return those that were written.

    Args:
        may_lack: leave out precisions that can't hold this model's weights, with an ExportWarning.

    Raises WeightError for such a precision otherwise, and if no precision is left.
    """
    lacking: dict[str, WeightError] = {}
    for job in jobs:
        if job.precision in lacking:
            continue
        meter.what = job.file
        try:
            write_model(job, folder, room)
        except WeightError as error:
            others = {one.precision for one in jobs} - {ANY, job.precision, *lacking}
            if not may_lack or error.code != PAST_FLOAT16 or job.precision == ANY or not others:
                raise
            lacking[job.precision] = error
    for precision, error in lacking.items():
        warn(ExportWarning(f"{precision} is left out: {error}", code="export.precision-left-out"))
    for job in jobs:
        if job.precision in lacking:
            for path in folder.glob(f"{glob.escape(job.file)}*"):
                path.unlink()  # the graph, and its files of weights
    return [job for job in jobs if job.precision not in lacking]


def _write_manifest(
    family: Family,
    layout: Layout,
    layout_name: str,
    checkpoint: Checkpoint,
    jobs: list[Job],
    folder: Path,
    name: str,
    ignored: Mapping[str, tuple[str, ...]],
) -> Manifest:
    """Write the files around the graphs and the manifest; the golden probe has no answers yet."""
    components: dict[str, dict[str, Variant]] = {}
    for job in jobs:
        variant = Variant(job.file, data_files(folder, job))
        components.setdefault(job.component, {})[job.precision] = variant
    precisions = [p for p in PRECISIONS if any(job.precision == p for job in jobs)]
    auto = _auto(layout_name, components, precisions)
    _write_client_files(layout, checkpoint, folder, components, auto, is_hub=layout_name == HUB)
    write_card(
        checkpoint,
        layout.hub_files(),
        folder,
        name=name,
        forms={p: _describe(p, folder, components) for p in precisions},
        messages=family.prompt.caption,
        runs=layout_name == HUB,
        ignored=ignored,
    )
    manifest = Manifest(
        producer=f"vlmport {__version__}",
        name=name,
        family=family.name,
        layout=layout_name,
        components=components,
        auto=auto,
        files=hash_folder(folder),
        dims=family.dims,
        cache=family.cache,
        prompt=family.prompt,
        generation=family.generation,
        pixels=family.pixels,
        golden=_golden_input(family, layout),
        image_options=family.image_options if layout.image_tokens is None else {},
        ignored_weights=ignored,
    )
    write_manifest(folder, manifest)
    return manifest


def _write_client_files(
    layout: Layout,
    checkpoint: Checkpoint,
    folder: Path,
    components: Mapping[str, Mapping[str, Variant]],
    auto: Mapping[str, Mapping[str, str]],
    *,
    is_hub: bool,
) -> None:
    """Write what the Hub's clients read, and what only this layout's client reads."""
    transformers_js = _transformers_js(components, auto) if is_hub else None
    write_hub_files(checkpoint, layout.hub_files(), folder, transformers_js)
    chosen = {name: components[name][form].model for name, form in auto["cpu"].items()}
    for file, settings in layout.client_files(chosen).items():
        write_json(folder / file, settings)


def _golden_input(family: Family, layout: Layout) -> Golden:
    if (tokens := layout.image_tokens) is not None:
        return golden_input(lambda height, width: tokens, {})
    return golden_input(family.golden_tokens, family.golden_options)


def _try_out(bundle: Bundle) -> None:
    """Run the new bundle, and put its results for the golden probe into the manifest."""
    bundle.check()
    if bundle.manifest.layout == HUB:
        check_prompt(bundle)
    for precision in bundle.manifest.precisions:
        if PRECISIONS[precision].is_half:
            check_float16(bundle, precision)
    write_manifest(bundle.folder, record(bundle, bundle.manifest.precisions))


def _auto(
    layout: str, components: Mapping[str, Mapping[str, Variant]], precisions: list[str]
) -> dict[str, dict[str, str]]:
    """Choose for each device the precision of each component, among those that were exported."""
    many_rows = LAYOUTS[layout].many_rows

    def best(component: str, of_many: Preferred, of_one: Preferred) -> str:
        if ANY in components[component]:
            return ANY
        wanted = [*(of_many if component in many_rows else of_one), *SUFFIXES]
        return next(precision for precision in wanted if precision in precisions)

    return {
        device: {component: best(component, *orders) for component in components}
        for device, orders in PREFERRED.items()
    }


def _transformers_js(
    components: Mapping[str, Mapping[str, Variant]], auto: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Make that client's section of config.json: external data files, and dtypes by device."""
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
    """Describe a precision in one line of the model card, with the megabytes to download."""
    files = {
        file
        for forms in components.values()
        for one, variant in forms.items()
        if one in (precision, ANY)
        for file in (variant.model, *variant.data)
    }
    size = sum((folder / file).stat().st_size for file in files)
    return f"{PRECISIONS[precision].meaning}; {size / 1e6:.1f} MB"


def _default_name(source: str | Path, checkpoint: Checkpoint) -> str:
    """Return the Hub id as given, or the folder's name."""
    local = Path(source).expanduser().exists()
    return checkpoint.folder.resolve().name if local else str(source)
