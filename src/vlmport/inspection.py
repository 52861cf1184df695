"""What `vlmport inspect` shows of a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from rich.console import Console
from rich.table import Table

from vlmport.bundle import Bundle, Variant


def describe(bundle: Bundle, console: Console) -> None:
    """Print name, sizes, components with their inputs and outputs, auto choices and parity."""
    manifest = bundle.manifest
    total = sum(entry.size for entry in manifest.files.values())
    lines = {
        "name": manifest.name,
        "family": manifest.family,
        "written by": manifest.producer,
        "precisions": ", ".join(manifest.precisions),
        "size": f"{total / 1e6:.1f} MB in {len(manifest.files)} files",
        "pixels": f"{manifest.pixels.resample}, equal to {manifest.pixels.equals}",
        "stop ids": ", ".join(map(str, manifest.generation.stop_token_ids)),
        "parity": _parity(manifest.parity),
    }
    for key, value in lines.items():
        console.print(f"{key:<11} {value}", markup=False, highlight=False)
    console.print(_dims(manifest.dims.__dict__), markup=False, highlight=False)
    console.print(_components(bundle))
    for device, choice in manifest.auto.items():
        chosen = ", ".join(f"{name} {precision}" for name, precision in choice.items())
        console.print(f"auto on {device}: {chosen}", markup=False, highlight=False)


def probe_bundle(bundle: Bundle, device: str, console: Console) -> bool:
    """Run the golden input at every precision; whether all gave what the manifest expects."""
    from vlmport.runtime.components import Components
    from vlmport.runtime.probe import check_golden

    passed = True
    for precision in bundle.manifest.golden.expected:
        components = Components.open(bundle, precision=precision, device=device)
        report = check_golden(components, bundle.manifest.golden)
        console.print(f"probe {precision} on {device}: {report}", markup=False, highlight=False)
        passed = passed and report.passed
    return passed


def _dims(dims: Mapping[str, int]) -> str:
    return "dims        " + ", ".join(f"{name} {value}" for name, value in dims.items())


def _parity(parity: Mapping[str, object] | None) -> str:
    if parity is None:
        return "not verified yet"
    return f"{'passed' if parity['passed'] else 'FAILED'} against {parity['reference']}"


def _components(bundle: Bundle) -> Table:
    table = Table("component", "precision", "MB", "inputs", "outputs")
    for name, forms in bundle.manifest.components.items():
        for precision, variant in forms.items():
            graph = onnx.load(bundle.path(variant.model), load_external_data=False).graph
            table.add_row(
                name,
                precision,
                f"{_size(bundle, variant) / 1e6:.2f}",
                _ports(graph.input),
                _ports(graph.output),
            )
    return table


def _size(bundle: Bundle, variant: Variant) -> int:
    return sum(bundle.manifest.files[name].size for name in (variant.model, *variant.data))


def _ports(values: Iterable[onnx.ValueInfoProto]) -> str:
    """A line a tensor; the cache's are counted instead."""
    lines, cache = [], 0
    for value in values:
        if value.name.startswith(("past_key_values.", "present.")):
            cache += 1
            continue
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        dims = ", ".join(str(d.dim_param or d.dim_value) for d in tensor.shape.dim)
        lines.append(f"{value.name} {kind}[{dims}]")
    return "\n".join(lines + ([f"{cache} cache tensors"] if cache else []))
