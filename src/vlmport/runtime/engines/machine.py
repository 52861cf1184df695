"""Facts of this machine that results of an engine depend on."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any


@functools.cache
def read_cpu() -> tuple[str, frozenset[str]]:
    """Read the CPU's name and its instruction sets; empty on other systems than Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    first: dict[str, str] = {}
    for key, _, value in lines:
        first.setdefault(key.strip(), value.strip())
    name = first.get("model name", "")
    return name, frozenset(first.get("flags", first.get("Features", "")).split())


def machine_key() -> dict[str, Any]:
    """Describe the machine: another value means that results have to be found again."""
    name, flags = read_cpu()
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "flags": sorted(flags),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "release": platform.release(),
    }


def environment() -> dict[str, str]:
    """Return the environment's variables that engines read."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("ORT_", "ONEDNN_", "OV_", "CUDA_VISIBLE"))
    }
