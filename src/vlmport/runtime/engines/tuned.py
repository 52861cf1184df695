"""What `vlmport tune` found to be the fastest for a bundle on this machine, as it is kept.

One file in `$VLMPORT_CACHE/tuned` for each bundle, named by a digest of the bundle's files, the
machine, and the versions of ONNX Runtime and of its plugins. Deleting any of them loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vlmport import __version__
from vlmport.bundle import Manifest
from vlmport.bundle.cache import cache_folder
from vlmport.errors import VlmportError
from vlmport.runtime.engines.machine import machine_key
from vlmport.runtime.graphs.devices import PLUGINS, choose_forms, parse_engines

LARGEST = 1 << 16  # bytes of a kept choice


@dataclass(frozen=True)
class Tuning:
    """The fastest choices for a bundle on this machine.

    Attributes:
        precision, device, threads: as for `load`.
        older_attention: run the decoder with ONNX Runtime's older kernel of grouped-query
            attention. Results differ in the last bits.
    """

    precision: str
    device: str
    threads: int | None = None
    older_attention: bool = False

    def __str__(self) -> str:
        parts = [f"precision {self.precision}", f"device {self.device}"]
        if self.threads is not None:
            parts.append(f"{self.threads} threads")
        if self.older_attention:
            parts.append("older attention kernel")
        return ", ".join(parts)


def find_tuning(manifest: Manifest) -> Tuning | None:
    """Read what was kept for this bundle and machine; None if nothing was, or it can't be used."""
    with contextlib.suppress(OSError, ValueError, RecursionError, VlmportError):
        path = record_of(manifest)
        if path.stat().st_size > LARGEST:
            return None
        found = _checked(json.loads(path.read_text(encoding="utf-8")))
        if found is not None:
            choose_forms(
                manifest, found.precision, parse_engines(found.device, manifest.components)
            )
        return found
    return None


def keep_tuning(manifest: Manifest, tuning: Tuning) -> Path | None:
    """Save a choice; return its file, or None where the cache can't be written."""
    path = record_of(manifest)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(tuning), file)
            os.replace(partial, path)
        except OSError:
            os.unlink(partial)
            raise
        return path
    return None


def record_of(manifest: Manifest) -> Path:
    """Return the file of a bundle's choice on this machine, whether it is there or not."""
    depends = {
        "files": {name: entry.sha256 for name, entry in sorted(manifest.files.items())},
        "machine": machine_key(),
        "versions": [__version__, ort.__version__],
        "plugins": {name: plugin.version() for name, plugin in PLUGINS.items()},
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return cache_folder().parent / "tuned" / f"{digest[:32]}.json"


def _checked(value: Any) -> Tuning | None:
    if not isinstance(value, Mapping) or value.keys() != {one.name for one in fields(Tuning)}:
        return None
    tuning = Tuning(**value)
    strings = isinstance(tuning.precision, str) and isinstance(tuning.device, str)
    threads = tuning.threads
    counted = threads is None or (type(threads) is int and threads >= 1)
    return tuning if strings and counted and isinstance(tuning.older_attention, bool) else None
