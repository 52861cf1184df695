"""Pillow's resize against the same resize as an ONNX graph: time and peak memory.

    python benchmarks/image_processor.py [--threads N] [--repeats N]

The two are run in turn, so that both see the same load, and the medians are compared. Pillow is
timed from an Image to an Image, its own format, and once more from array to array, which is what
the graph does. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import PIL
from PIL import Image

from vlmport.graph.builder import add_output, new_graph, to_model
from vlmport.graph.pillow_resize import Resample, resize

# (height, width) of the picture and of the result
CASES = [
    ((3000, 4000), (224, 224)),
    ((3000, 4000), (384, 384)),
    ((3000, 4000), (1536, 2048)),
    ((480, 640), (224, 224)),
]
FILTERS = [Resample.BILINEAR, Resample.BICUBIC, Resample.LANCZOS]
ISA = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "asimd", "sve")


def model(resample: Resample) -> bytes:
    builder = new_graph("resize")
    image = builder.input("image", ir.DataType.UINT8, ["height", "width", 3])
    rows, columns = (builder.input(name, ir.DataType.INT64, []) for name in ("rows", "columns"))
    resized = resize(builder.op, image, rows, columns, resample)
    add_output(builder, resized, "resized", ir.DataType.UINT8, ["new_height", "new_width", 3])
    return ir.to_proto(to_model(builder)).SerializeToString()


def open_session(data: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Row(NamedTuple):
    """One line of the table. Times are medians in ms, memory is in bytes of the picture."""

    filter: str
    old: tuple[int, int]
    new: tuple[int, int]
    pillow: float
    pillow_arrays: float
    graph: float
    differing: int
    graph_peak: float
    pillow_peak: float

    def __str__(self) -> str:
        (height, width), (rows, columns) = self.old, self.new
        name = f"{self.filter:9}{width}x{height} to {columns}x{rows}"
        return (
            f"{name:36}{self.pillow:9.1f}{self.pillow_arrays:9.1f}{self.graph:9.1f}"
            f"{self.graph / self.pillow:9.2f}{self.graph_peak:9.2f}{self.pillow_peak:9.2f}"
            f"{self.differing:10}"
        )


def picture(height: int, width: int) -> np.ndarray:
    """Soft shapes with grain."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.integers(-8, 9, (height, width, 3), dtype=np.int16)
    return np.clip(soft + grain, 0, 255).astype(np.uint8)


def run_graph(session: ort.InferenceSession, image: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    feeds = {"image": image, "rows": np.array(new[0]), "columns": np.array(new[1])}
    return np.asarray(session.run(None, feeds)[0])


def run_pillow(image: Image.Image, new: tuple[int, int], resample: Resample) -> Image.Image:
    return image.resize((new[1], new[0]), int(resample))


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(
    old: tuple[int, int], new: tuple[int, int], resample: Resample, threads: int, repeats: int
) -> Row:
    array = picture(*old)
    image = Image.fromarray(array)
    session = open_session(model(resample), threads)
    calls: list[Callable[[], object]] = [
        lambda: run_pillow(image, new, resample),
        lambda: np.asarray(run_pillow(Image.fromarray(array), new, resample)),
        lambda: run_graph(session, array, new),
    ]
    expected = np.asarray(run_pillow(image, new, resample))
    differing = int(np.count_nonzero(run_graph(session, array, new) != expected))
    repeats *= 1 if array.size > 10_000_000 else 10
    times = [[milliseconds(call) for call in calls] for _ in range(repeats)]
    pillow, arrays, graph = (
        round(statistics.median(column), 2) for column in zip(*times, strict=True)
    )
    peaks = {}
    for kind in ("graph", "pillow"):
        # A new process each: a peak never comes down again.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[kind] = pool.apply(peak_memory, (kind, old, new, resample, threads))
    return Row(
        filter=resample.name.lower(),
        old=old,
        new=new,
        pillow=pillow,
        pillow_arrays=arrays,
        graph=graph,
        differing=differing,
        graph_peak=peaks["graph"],
        pillow_peak=peaks["pillow"],
    )


def peak_memory(
    kind: str, old: tuple[int, int], new: tuple[int, int], resample: Resample, threads: int
) -> float:
    """How far one resize raises the peak of a fresh process, in bytes of the picture."""
    array = np.full((*old, 3), 7, np.uint8)
    if kind == "graph":
        session = open_session(model(resample), threads)
        run_graph(session, array[:64, :64].copy(), (32, 32))
        call = lambda: run_graph(session, array, new)  # noqa: E731
    else:
        image = Image.fromarray(array)
        call = lambda: run_pillow(image, new, resample)  # noqa: E731
    before = peak_bytes()
    call()
    return round((peak_bytes() - before) / array.nbytes, 2)


def peak_bytes() -> int:
    """The peak of this process; `ru_maxrss` would start with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def machine() -> dict[str, object]:
    """Cores and instruction sets; no names."""
    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((x.split() for x in lines if x.startswith(("flags", "Features"))), [])
    return {
        "cores": os.cpu_count(),
        "isa": " ".join([platform.machine(), *(name for name in ISA if name in flags)]),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    header = {
        "benchmark": "image_processor",
        "pillow": PIL.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        **machine(),
    }
    print(", ".join(f"{key} {value}" for key, value in header.items() if key != "benchmark"))
    columns = ("Pillow", "arrays", "graph", "ratio", "memory", "Pillow's", "differing")
    print(f"{'':36}" + "".join(f"{name:>9}" for name in columns[:-1]) + f"{columns[-1]:>10}")
    rows = []
    for old, new in CASES:
        for resample in FILTERS:
            rows.append(measure(old, new, resample, options.threads, options.repeats))
            print(rows[-1], flush=True)
    print("Times: medians in ms. Memory: rise of the peak in bytes of the picture.")
    print(json.dumps({**header, "rows": [row._asdict() for row in rows]}))


if __name__ == "__main__":
    main()
