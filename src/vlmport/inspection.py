"""What `vlmport inspect` shows of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from rich.console import Console

from vlmport.bundle import ANY, Bundle, Variant
from vlmport.errors import BundleError


def describe(bundle: Bundle, console: Console) -> None:
    """Print name, sizes, components with their inputs and outputs, auto choices and parity."""
    manifest = bundle.manifest
    total = sum(entry.size for entry in manifest.files.values())
    lines = {
        "name": manifest.name,
        "family": manifest.family,
        "layout": manifest.layout,
        "written by": manifest.producer,
        "precisions": ", ".join(manifest.precisions),
        "size": f"{total / 1e6:.1f} MB in {len(manifest.files)} files",
        "pixels": f"{manifest.pixels.resample}, equal to {manifest.pixels.equals}",
        "stop ids": ", ".join(map(str, manifest.generation.stop_token_ids)),
        "parity": _parity(manifest.parity),
    }
    lines |= {name.replace("num_", ""): str(value) for name, value in vars(manifest.dims).items()}
    for key, value in lines.items():
        _print(console, f"{key:<16} {value}")
    for name, forms in manifest.components.items():
        _print(console, "")
        sizes = [f"{form} {_size(bundle, variant) / 1e6:.2f} MB" for form, variant in forms.items()]
        _print(console, f"{name:<24} {', '.join(sizes)}")
        for line in _ports(bundle, next(iter(forms.values()))):
            _print(console, f"  {line}")
    _print(console, "")
    for device, choice in manifest.auto.items():
        chosen = ", ".join(f"{name} {form}" for name, form in choice.items() if form != ANY)
        _print(console, f"auto on {device:<8} {chosen}")


def probe_bundle(bundle: Bundle, device: str, console: Console) -> bool:
    """Run the golden input at every precision; whether all gave what the manifest expects.

    A precision without a golden fails: nothing is known of it.
    """
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
        report = check_golden(open_graphs(bundle, precision, device), golden)
        _print(console, f"probe {report}")
        passed = passed and report.ok
    return passed


def _print(console: Console, text: str) -> None:
    """As it is: brackets are dims, not markup, and a pipe decides where lines break."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _parity(parity: Mapping[str, object] | None) -> str:
    if parity is None:
        return "not verified yet"
    return f"{'passed' if parity['passed'] else 'FAILED'} against {parity['reference']}"


def _size(bundle: Bundle, variant: Variant) -> int:
    return sum(bundle.manifest.files[name].size for name in (variant.model, *variant.data))


def _load(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise BundleError(
            f"{path}: not an ONNX graph: {error}", hint="download or export the bundle again"
        ) from error


def _ports(bundle: Bundle, variant: Variant) -> Iterator[str]:
    """A line for each input and output; those of the cache are counted."""
    graph = _load(bundle.path(variant.model))
    cache = bundle.manifest.cache
    for way, values in (("in ", graph.input), ("out", graph.output)):
        tensors = [v for v in values if not v.name.startswith((cache.past, cache.present))]
        for value in tensors:
            tensor = value.type.tensor_type
            kind = _type_name(tensor.elem_type)
            dims = ", ".join(str(d.dim_param or d.dim_value) for d in tensor.shape.dim)
            yield f"{way} {value.name} {kind}[{dims}]"
        if rest := [value for value in values if value not in tensors]:
            yield f"{way} {rest[0].name} … {rest[-1].name}, {len(rest)} cache tensors"


def _type_name(code: int) -> str:
    """Such as 'float16'; a file from elsewhere may hold a number that ONNX gives no name."""
    try:
        return onnx.TensorProto.DataType.Name(code).lower()
    except ValueError:
        return f"type {code}, unknown"
