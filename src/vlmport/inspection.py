"""Show what `vlmport inspect` shows about a bundle, an ONNX file, or a folder of ONNX files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlmport.bundle import ANY, Bundle, Manifest, Variant
from vlmport.bundle.layouts import HUB
from vlmport.errors import BundleError, some_names
from vlmport.files.onnx_file import OnnxFile, Port, port, read_model, read_onnx

if TYPE_CHECKING:
    from vlmport.runtime.graphs.base import BundleGraphs


def describe(bundle: Bundle, console: Console) -> None:
    """Print name, sizes, components with their inputs and outputs, auto choices and results."""
    manifest = bundle.manifest
    total = sum(entry.size for entry in manifest.files.values())
    lines = {
        "name": manifest.name,
        "family": manifest.family,
        "layout": manifest.layout,
        "written by": manifest.producer,
        "precisions": ", ".join(
            f"{name} {_download(manifest, name)}" for name in manifest.precisions
        ),
        "all files": f"{total / 1e6:.1f} MB in {len(manifest.files)} files",
        "pixels": f"{manifest.pixels.resample}, as {manifest.pixels.equals} has them",
        "stop ids": ", ".join(map(str, manifest.generation.stop_token_ids)),
    }
    lines |= {name.replace("num_", ""): str(value) for name, value in vars(manifest.dims).items()}
    for key, value in lines.items():
        _print(console, f"{key:<16} {value}")
    for pattern, names in manifest.ignored_weights.items():
        _print(console, f"{'ignored weights':<16} {pattern}: {len(names)}, {some_names(names, 4)}")
    for name, forms in manifest.components.items():
        _print(console, "")
        sizes = [f"{form} {_size(bundle, variant) / 1e6:.2f} MB" for form, variant in forms.items()]
        _print(console, f"{name:<24} {', '.join(sizes)}")
        for line in _ports(bundle, forms):
            _print(console, f"  {line}")
    _print(console, "")
    for device, choice in manifest.auto.items():
        chosen = ", ".join(f"{name} {form}" for name, form in choice.items() if form != ANY)
        size = _download(manifest, "auto", device)
        _print(console, f"auto on {device:<8} {chosen}; {size}")
    _print(console, "")
    for line in (*_parity(manifest.parity), *_accuracy(manifest.accuracy)):
        _print(console, line)


def describe_onnx(path: Path, console: Console) -> None:
    """Print the contents of one ONNX file; its weights are not loaded.

    Raises BundleError for what is no whole ONNX file, and, once all is printed, where external
    files are missing or too short.
    """
    graph = read_onnx(path)
    lines = {
        "file": f"{path}, {graph.size / 1e6:.2f} MB",
        "IR version": str(graph.ir_version),
        "opsets": ", ".join(f"{domain} {number}" for domain, number in graph.opsets.items()),
        "written by": graph.producer or "not said",
    }
    for key, value in lines.items():
        _print(console, f"{key:<16} {value}")
    _print(console, "")
    for way, ports in (("in ", graph.inputs), ("out", graph.outputs)):
        for one in ports:
            _print(console, f"{way} {one}")
    for line in _contents(graph):
        _print(console, line)
    graph.check()


def describe_folder(folder: Path, files: Iterable[Path], console: Console) -> list[BundleError]:
    """Print a line for each ONNX file of a folder that is no bundle.

    Returns the errors of those that can't be read.
    """
    problems = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            graph = read_onnx(path)
            names = [", ".join(_folded(ports)) for ports in (graph.inputs, graph.outputs)]
            _print(console, f"{name:<40} {graph.total_size / 1e6:.2f} MB  {' → '.join(names)}")
            graph.check()
        except BundleError as error:
            problems.append(error)
    return problems


def probe_bundle(bundle: Bundle, device: str, console: Console) -> bool:
    """Run the golden input at every precision, and return whether all gave the recorded result.

    A precision without a recorded result fails: nothing is known about it.
    """
    from vlmport.runtime.graphs.devices import HOST
    from vlmport.runtime.probe import check_golden, open_graphs

    golden = bundle.manifest.golden
    precisions = bundle.manifest.precisions
    passed = bool(precisions)
    if not precisions:
        _print(console, "probe: no precision of this bundle has all components, so nothing was run")
    for precision in precisions:
        if precision not in golden.expected:
            _print(console, f"probe {precision}: no golden is recorded, so nothing was run")
            passed = False
            continue
        graphs = open_graphs(bundle, precision, device)
        if bundle.manifest.layout == HUB and any(one != HOST for one in graphs.engines.values()):
            passed = _probe_engines(graphs, console) and passed
            continue
        report = check_golden(graphs, golden)
        _print(console, f"probe {report}")
        passed = passed and report.ok
    return passed


def _probe_engines(graphs: BundleGraphs, console: Console) -> bool:
    """Compare each component on its engine with the CPU; return whether all may be trusted."""
    from vlmport.runtime.engines.trust import foreign, run_probe

    verdicts = run_probe(graphs, foreign(graphs))
    for one in verdicts:
        found = one["problem"] or f"as on the CPU (within {one['error']:.2g}, "
        if one["problem"] is None:
            found += f"allowed {one['tolerance']:.2g})"
        _print(console, f"probe {graphs.precision}: {one['component']} on {one['engine']}: {found}")
    return all(one["problem"] is None for one in verdicts)


def _print(console: Console, text: str) -> None:
    """Print a text as it is: brackets are dims, not markup, and lines are not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _contents(graph: OnnxFile) -> Iterator[str]:
    """List operators, weights, files and metadata of a graph, a line each."""
    total = sum(counter.total() for counter in graph.operators.values())
    yield ""
    yield f"operators        {total}"
    for domain, counter in graph.operators.items():
        counts = ", ".join(f"{name} {count}" for name, count in counter.most_common())
        yield f"  {domain:<14} {counts}"
    if graph.functions:
        yield f"functions        {', '.join(graph.functions)}"
    sizes = sum(size for _, size in graph.weights.values())
    tensors = sum(count for count, _ in graph.weights.values())
    yield f"weights          {sizes / 1e6:.2f} MB in {tensors} tensors"
    for name, (count, size) in graph.weights.items():
        yield f"  {name:<14} {size / 1e6:.2f} MB in {count}"
    if graph.external:
        yield "external files"
    for one in graph.external:
        yield f"  {one.problem or f'{one.name}: {(one.size or 0) / 1e6:.2f} MB'}"
    for key, value in graph.metadata.items():
        yield f"metadata         {key}: {value}"


def _parity(parity: Mapping[str, Any] | None) -> Iterator[str]:
    """List the result of `vlmport verify`: the verdict, and the checks of each precision."""
    if parity is None:
        yield "parity           not verified yet"
        return
    good = [row.get("passed") is True for row in parity["rows"]]
    passed = "passed" if parity["passed"] and good and all(good) else "FAILED"
    if not good:
        passed = "no checks"
    yield f"parity           {passed} against {parity['reference']}"
    checks = Counter(str(row.get("precision", "?")) for row in parity["rows"])
    for precision, count in checks.items():
        broken = [
            str(row.get("rung", "?"))
            for row in parity["rows"]
            if str(row.get("precision", "?")) == precision and row.get("passed") is not True
        ]
        note = f"; broken: {', '.join(dict.fromkeys(broken))}" if broken else ""
        yield f"  {precision:<14} {count - len(broken)} of {count} checks passed{note}"


def _accuracy(accuracy: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """List the figures of `vlmport eval`, a line for each precision on each data set."""
    entries = list(accuracy)
    if not entries:
        yield "accuracy         not measured yet"
        return
    # It imports ONNX Runtime, which is slow.
    from vlmport.evaluation.report import counted, losses, title_of

    for entry in entries:
        compared = losses(entry["figures"], entry["limits"])
        kept = entry["passed"] and all(one.passed for one in compared)
        passed = "within its limits" if kept else "a limit is BROKEN"
        if not compared:
            passed = "nothing compared with fp32"
        yield f"accuracy         {entry['data']}, {counted(entry)}, {entry['device']}: {passed}"
        for precision, figures in entry["figures"].items():
            shown = ", ".join(f"{title_of(name)} {points:.2f}" for name, points in figures.items())
            yield f"  {precision:<14} {shown}"


def _download(manifest: Manifest, precision: str, device: str = "cpu") -> str:
    """Return the size of a precision's files, such as '201.7 MB'."""
    names = manifest.files_of(manifest.choose(precision, device))
    return f"{sum(manifest.files[name].size for name in names) / 1e6:.1f} MB"


def _size(bundle: Bundle, variant: Variant) -> int:
    return sum(bundle.manifest.files[name].size for name in (variant.model, *variant.data))


def _ports(bundle: Bundle, forms: Mapping[str, Variant]) -> Iterator[str]:
    """List inputs and outputs; cache tensors are counted, those of some precisions marked."""
    cache = bundle.manifest.cache
    shown: dict[str, list[str]] = {}
    for form, variant in forms.items():
        graph = read_model(bundle.path(variant.model)).graph
        for way, values in (("in ", graph.input), ("out", graph.output)):
            ports = [port(value) for value in values]
            tensors = [one for one in ports if not one.name.startswith((cache.past, cache.present))]
            lines = [f"{way} {one}" for one in tensors]
            if rest := [one for one in ports if one not in tensors]:
                kind = rest[0].type
                lines.append(
                    f"{way} {rest[0].name} … {rest[-1].name}, {len(rest)} cache tensors {kind}"
                )
            for line in lines:
                shown.setdefault(line, []).append(form)
    # Inputs of all precisions before the outputs of any.
    for line, having in sorted(shown.items(), key=lambda one: one[0].startswith("out")):
        yield line if len(having) == len(forms) else f"{line} ({', '.join(having)})"


def _folded(ports: Iterable[Port]) -> list[str]:
    """List names, with numbered ones of one kind counted: 'past_key_values.0.key … (60)'."""
    groups: dict[str, list[str]] = {}
    for one in ports:
        stem = "".join("#" if letter.isdigit() else letter for letter in one.name)
        groups.setdefault(stem if "#" in stem else one.name, []).append(one.name)
    return [
        names[0] if len(names) == 1 else f"{names[0]} … ({len(names)})" for names in groups.values()
    ]
