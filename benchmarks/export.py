"""Exporting the captioner: vlmport at each precision beside torch.onnx.export of the same parts.

    python benchmarks/export.py [--rounds N] [--small] [--precisions fp32,q8,q4] [--torch dynamo]

Each export is a process of its own, and they are run in turn. `work` is the export itself, `whole`
the process with its imports; memory is the most that the process held. vlmport reads a bfloat16
checkpoint with LoRA, writes a bundle, and runs every graph once; torch exports the vision tower
with its projection and the decoder with its cache, from models that already lie in memory, with no
check and no quantization. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from captioner import REAL, SMALL, Size, write_captioner

from vlmport.benchmark.machine import describe_machine, interleaved, median, peak_memory

PACKAGES = ("vlmport", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "torch", "transformers")
PAST, NEW = 7, 5  # example lengths, which torch needs and must not bake in


def export_ours(source: Path, out: Path, precision: str) -> float:
    from vlmport.exporter import export

    start = time.perf_counter()
    export(source, out, precisions=precision)
    return time.perf_counter() - start


def export_torch(size: Size, out: Path, *, dynamo: bool) -> float:
    """Seconds for both parts; building the models is not counted."""
    import torch
    from torch_parts import Decoder, Tower

    out.mkdir()
    tower, decoder = Tower(size).eval(), Decoder(size).eval()
    start = time.perf_counter()
    for name, part in (("vision_encoder", tower), ("decoder", decoder)):
        inputs, names, outputs, axes = part.example(PAST, NEW)
        options = (
            {"dynamo": True, "dynamic_shapes": part.dynamic_shapes(), "optimize": True}
            if dynamo
            else {"dynamo": False, "dynamic_axes": axes}
        )
        with torch.no_grad():
            torch.onnx.export(
                part,
                inputs,
                str(out / f"{name}.onnx"),
                input_names=names,
                output_names=outputs,
                opset_version=20,
                **options,
            )
    return time.perf_counter() - start


def child(what: str, source: Path, out: Path, *, small: bool) -> None:
    size = SMALL if small else REAL
    if what.startswith("torch "):
        seconds = export_torch(size, out, dynamo=what.endswith("dynamo"))
    else:
        seconds = export_ours(source, out, what)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(json.dumps({"work": seconds, "peak": peak_memory(), "written": written}))


def in_process(what: str, source: Path, *, small: bool) -> dict[str, float]:
    """The child's figures, with the seconds of its whole life."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, __file__, "--child", what, str(source), f"{folder}/out"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, *["--small"] * small], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{what} failed:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1]) | {"whole": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="2 layers, to try the script out")
    parser.add_argument("--precisions", default="fp32,fp16,q8,q4")
    parser.add_argument("--torch", default="dynamo,legacy", help="exporters, or nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, source, out = arguments.child
        child(what, Path(source), Path(out), small=arguments.small)
        return
    names = [one for one in arguments.precisions.split(",") if one]
    names += [f"torch {one}" for one in arguments.torch.split(",") if one]
    with tempfile.TemporaryDirectory() as folder:
        source = write_captioner(Path(folder) / "captioner", SMALL if arguments.small else REAL)
        calls = {
            name: lambda name=name: in_process(name, source, small=arguments.small)
            for name in names
        }
        results = interleaved(calls, arguments.rounds)
    figures = {
        name: {key: median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    print(f"{'':16}{'work, s':>10}{'whole, s':>10}{'peak, MB':>10}{'written, MB':>13}")
    for name, row in figures.items():
        print(
            f"{name:16}{row['work']:10.2f}{row['whole']:10.2f}"
            f"{row['peak'] / 1e6:10.0f}{row['written'] / 1e6:13.1f}"
        )
    settings = {"rounds": arguments.rounds, "small": arguments.small}
    machine = describe_machine(None, PACKAGES)
    report = {"benchmark": "export", "machine": machine, "settings": settings, "figures": figures}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
