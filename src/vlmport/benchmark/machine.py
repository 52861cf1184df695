"""Describe the machine, and measure several calls in turn.

Figures of one machine mean little on another, and those of a busy machine mean little at all. So
calls that are compared run in turn, many times, and medians are given.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from vlmport.runtime.engines.machine import read_cpu

Key = TypeVar("Key")

# The flags, of those that Linux lists, by which ONNX Runtime chooses kernels.
INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def describe_machine(
    threads: int | None, packages: Iterable[str] = ("vlmport", "onnxruntime", "numpy")
) -> dict[str, Any]:
    """List CPU, threads, load, and versions of packages; unknown facts are left out."""
    model, flags = read_cpu()
    facts = {
        "cpu": model or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": os.cpu_count(),
        "threads": threads if threads is not None else "one a core",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }
    return {name: value for name, value in facts.items() if value is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory() -> int | None:
    """Peak memory of this process in bytes; None where the system does not tell.

    Linux's own figure comes first: `ru_maxrss` of a child begins with that of its parent.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def interleaved(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[Any]]:
    """Run all calls in each round, and return the results of each call.

    Every other round runs them in the opposite order, so that what slows the machine for a while
    slows all of them.
    """
    results: dict[Key, list[Any]] = {key: [] for key in calls}
    for number in range(rounds):
        for key in list(calls)[:: -1 if number % 2 else 1]:
            results[key].append(calls[key]())
    return results


def milliseconds(call: Callable[[], object]) -> float:
    """Measure one call, in milliseconds."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def median(values: Iterable[float]) -> float:
    """The median as a float."""
    return float(statistics.median(values))
