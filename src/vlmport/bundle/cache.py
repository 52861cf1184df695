"""Cache of the bundles that `load` exports, so that the next run finds them.

An entry is a folder in `$VLMPORT_CACHE/bundles` (by default in the platform's cache folder), named
after its checkpoint, the request, and a digest of all that it depends on: the checkpoint's
files, the adapter's and this package's own code. Deleting any of it loses nothing.

After an export, entries that are no longer of use are removed: see `prune`. The time at which an
entry was last used is its folder's modification time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import platformdirs

from vlmport.bundle.folder import Bundle, is_bundle
from vlmport.bundle.manifest_file import MANIFEST
from vlmport.errors import BundleError

__all__ = ["cache_folder", "entry_name", "open_entry", "prune"]

# The files that an export reads; anything else in a folder does not change it.
INGREDIENTS = ("*.json", "*.safetensors", "*.jinja", "*/*.jinja", "README.md", "LICENSE*")

HOUR, DAY = 3600, 24 * 3600
SUPERSEDED_AFTER = HOUR  # another process may still run it
UNUSED_AFTER = 30 * DAY
ABANDONED_AFTER = DAY  # no export takes that long

ENTRY = re.compile(r"(.+)-[0-9a-f]{16}")
UNFINISHED = re.compile(r"\..+\.(partial|old|gone|new)-\w+")


def cache_folder() -> Path:
    """The folder of all entries."""
    root = os.environ.get("VLMPORT_CACHE") or platformdirs.user_cache_path("vlmport")
    return Path(root) / "bundles"


def entry_name(folder: Path, adapter: Path | None, precisions: Sequence[str]) -> str:
    """Name an entry: `<checkpoint>-<digest of the request>-<digest of all that it depends on>`.

    Entries that differ only in the last part are one request at different times.
    """
    folders = [one for one in (folder, adapter) if one is not None]
    asked = [sorted(precisions), *(str(one.resolve()) for one in folders)]
    depends = [_code(), asked, *(_ingredients(one) for one in folders)]
    return f"{folder.resolve().name}-{_digest(asked)[:8]}-{_digest(depends)[:16]}"


def open_entry(entry: Path) -> Bundle | None:
    """Open the bundle and mark it as used now; None if there is none or it is damaged."""
    try:
        os.utime(entry)
    except FileNotFoundError:
        return None
    except OSError:
        pass  # a cache that can only be read
    try:
        return Bundle.open(entry) if is_bundle(entry) else None
    except BundleError:
        return None


def prune(kept: Path) -> None:
    """Remove entries that are no longer of use, after the entry `kept` was made.

    These are: entries of the same request whose checkpoint or code has changed since, once unused
    for an hour; entries unused for 30 days; the remains of an export that was killed.
    Nothing else in the folder is touched. An entry that can't be removed stays.
    """
    request = _request(kept)
    for path in _folders(kept.parent):
        if path == kept:
            continue
        if UNFINISHED.fullmatch(path.name):
            _remove(path, ABANDONED_AFTER)
        elif ENTRY.fullmatch(path.name) and (path / MANIFEST).is_file():
            _remove(path, SUPERSEDED_AFTER if _request(path) == request else UNUSED_AFTER)


def _request(entry: Path) -> str | None:
    found = ENTRY.fullmatch(entry.name)
    return found[1] if found else None


def _folders(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]


def _remove(path: Path, after: float) -> None:
    """Remove a folder that was last used more than `after` seconds ago.

    It is renamed first, so that other processes no longer find it. If one of them marked it as
    used just before, it is put back.
    """
    with contextlib.suppress(OSError):
        if _age(path) <= after:
            return
        gone = Path(tempfile.mkdtemp(prefix=f".{path.name}.gone-", dir=path.parent))
        try:
            os.rename(path, gone / "entry")
            if _age(gone / "entry") <= after:
                os.rename(gone / "entry", path)
        finally:
            shutil.rmtree(gone, ignore_errors=True)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _ingredients(folder: Path) -> list[object]:
    """List name, size and time of each file: enough to see a change without reading."""
    found = sorted(path for pattern in INGREDIENTS for path in folder.glob(pattern))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


@functools.cache
def _code() -> str:
    """Compute a digest of the package's modules, which takes a few milliseconds.

    The version would not do: it stays the same while the code is developed.
    """
    package = Path(str(resources.files("vlmport")))
    modules = sorted([*package.rglob("*.py"), *package.glob("*.json")])
    hashed = [hashlib.sha256(path.read_bytes()).hexdigest() for path in modules]
    names = [path.relative_to(package).as_posix() for path in modules]
    return _digest(list(zip(names, hashed, strict=True)))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
