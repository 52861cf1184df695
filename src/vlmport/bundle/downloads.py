"""Check the files of a downloaded bundle against its manifest, once.

Files that were right are remembered by size and time of modification, in one file per bundle in
`$VLMPORT_CACHE/verified`. Deleting any of them loses nothing: the next load checks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlmport.bundle.cache import cache_folder
from vlmport.bundle.folder import Bundle

LARGEST_RECORD = 1 << 24  # bytes


def check_once(bundle: Bundle, needed: Collection[str]) -> None:
    """Compare the SHA-256 of the files that have changed since the last check.

    Raises BundleError naming every file that is not as the manifest says.
    """
    record = _record_of(bundle.folder)
    known, listed = _read(record), bundle.manifest.files
    now = {name: _state(bundle.path(name), listed[name].sha256) for name in needed}
    if changed := [name for name, state in now.items() if known.get(name) != state]:
        bundle.check(hashes=True, needed=changed)
        _write(record, known | now)


def _record_of(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder().parent / "verified" / f"{name}.json"


def _state(path: Path, sha256: str) -> list[Any]:
    """Describe a file: the result differs when the file or its entry in the manifest changes."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, sha256]
    return [None, None, sha256]


def _read(record: Path) -> dict[str, Any]:
    """Read the states of the files that were right; empty if the record can't be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if record.stat().st_size <= LARGEST_RECORD:
            known = json.loads(record.read_text(encoding="utf-8"))
            return known if isinstance(known, dict) else {}
    return {}


def _write(record: Path, known: dict[str, Any]) -> None:
    """Save the record; a cache that can't be written only costs the time of the next check."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=record.parent, suffix=".partial")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(known, file)
            os.replace(partial, record)
        except OSError:
            os.unlink(partial)
            raise
