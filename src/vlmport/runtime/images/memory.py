"""Find out how much memory this process can still allocate (on Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60  # cgroup v1 writes a number as large as this for "no limit"


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated; None where the system does not tell.

    It is the minimum of the machine's free memory, the limit of the cgroup (a container) and the
    limit of `ulimit -v`.

    Args:
        root: where `proc` and `sys` are, for tests.
    """
    found = [*_machine(root), *_cgroups(root), *_address_space(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    fields = dict(line.split(":", 1) for line in _lines(root / "proc/meminfo") if ":" in line)
    if "MemAvailable" in fields:
        yield sum(
            1024 * int(fields.get(name, "0").split()[0]) for name in ("MemAvailable", "SwapFree")
        )


def _cgroups(root: Path) -> Iterator[int]:
    """Yield the free memory of this process's cgroup, and of each one above it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, most, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, most = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
        else:
            continue
        below = Path(path.strip("/"))
        for folder in [top / below, *(top / one for one in below.parents)]:
            limit, usage = _number(folder / most), _number(folder / used)
            if limit is not None and usage is not None and limit < UNLIMITED:
                yield limit - usage + _cached_files(folder / "memory.stat")


def _cached_files(stat: Path) -> int:
    """Return the bytes of cached files in a cgroup, which are freed when memory is needed."""
    values = dict(line.split(" ", 1) for line in _lines(stat) if " " in line)
    name = "total_inactive_file" if "total_inactive_file" in values else "inactive_file"
    return int(values.get(name, "0"))


def _address_space(root: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = _lines(root / "proc/self/statm")
    if limit != resource.RLIM_INFINITY and taken:
        yield limit - int(taken[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
