"""A model source, whatever it is, to a bundle: built-in name, bundle, checkpoint or Hub id.

A checkpoint is exported once, into the user's cache, and found there the next time. The cache is
`$VLMPORT_CACHE`, by default the platform's cache folder; deleting it loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from vlmport import __version__
from vlmport.builtin import builtin_folder, builtin_models
from vlmport.bundle import DEFAULT_PRECISIONS, MANIFEST, SUFFIXES, Bundle, is_bundle, read_manifest
from vlmport.checkpoint import locate_adapter
from vlmport.checkpoint.source import fetch_files, find_folder
from vlmport.errors import BundleError, OptionError
from vlmport.runtime.model import VLM

if TYPE_CHECKING:
    from vlmport.export import Progress

__all__ = ["builtin_models", "cache_folder", "load", "resolve"]

# What an export is made from; anything else in a folder does not change it.
INGREDIENTS = ("*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*")


def load(
    source: str | Path = "shapes",
    *,
    precision: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> VLM:
    """A model ready to caption, from a built-in name, a bundle, a checkpoint folder or a Hub id.

    Args:
        precision: auto, fp32, fp16, q8, q4, q4f16, or a mix such as 'vision=fp32,decoder=q4'.
        device: cpu, or another that the installed ONNX Runtime offers.
        threads: threads of ONNX Runtime, by default all cores.
        adapter: a PEFT folder, merged into a checkpoint when it is exported.
        revision: branch, tag or commit of a Hub id.
        progress: called during a first export with (done bytes, total bytes, file).

    Raises VlmportError: the message says what is wrong, `hint` what to do.
    """
    bundle = resolve(
        source,
        precisions=_needed(precision),
        adapter=adapter,
        revision=revision,
        progress=progress,
    )
    return VLM.open(bundle, precision=precision, device=device, threads=threads)


def resolve(
    source: str | Path,
    *,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    adapter: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """The bundle of a source; a checkpoint is exported into the cache unless it is there.

    Raises as `export` and `Bundle.open` do.
    """
    local = Path(source).expanduser().exists()
    folder = find_folder(builtin_folder(source) or source, revision)
    if is_bundle(folder):
        if adapter is not None:
            raise OptionError(
                f"{source}: an adapter can't be merged into a bundle",
                hint="export the checkpoint again with --adapter",
            )
        if not local:
            # A bundle on the Hub: so far only the small files at its root are here.
            folder = fetch_files(str(source), revision, read_manifest(folder / MANIFEST).files)
        return Bundle.open(folder)
    adapter_folder = None if adapter is None else locate_adapter(adapter)
    out = cache_folder() / _cache_name(folder, adapter_folder, precisions)
    if (cached := _open_cached(out)) is not None:
        return cached
    from vlmport.export import export  # takes a second to import, and most runs don't need it

    name = folder.resolve().name if local else str(source)
    try:
        if out.exists():
            shutil.rmtree(out)  # damaged, and in a folder of our own
        return export(
            folder,
            out,
            precisions=precisions,
            adapter=adapter_folder,
            name=name,
            progress=progress,
        )
    except Exception:
        # Another process may have exported the same in the meantime: then its bundle serves.
        if (cached := _open_cached(out)) is not None:
            return cached
        raise


def _needed(precision: str) -> tuple[str, ...]:
    """What to export of a checkpoint, so that this request can be served.

    One that is asked for by name is exported alone: it may be the only one that the model allows.
    """
    if precision in SUFFIXES:
        return (precision,)
    mixed = (part.partition("=")[2].strip() for part in precision.split(","))
    return tuple(dict.fromkeys([*DEFAULT_PRECISIONS, *(one for one in mixed if one in SUFFIXES)]))


def cache_folder() -> Path:
    """Where exported bundles are kept for later runs."""
    root = os.environ.get("VLMPORT_CACHE") or platformdirs.user_cache_path("vlmport")
    return Path(root) / "bundles"


def _open_cached(out: Path) -> Bundle | None:
    """A bundle of the cache, or None if there is none or it is damaged."""
    try:
        return Bundle.open(out) if is_bundle(out) else None
    except BundleError:
        return None


def _cache_name(folder: Path, adapter: Path | None, precisions: Sequence[str]) -> str:
    """The checkpoint's name and a digest of all that the export depends on."""
    ingredients = [_ingredients(one) for one in (folder, adapter) if one is not None]
    what = json.dumps([__version__, sorted(precisions), ingredients])
    return f"{folder.resolve().name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def _ingredients(folder: Path) -> list[object]:
    """Path, and name, size and time of each file: enough to see a change without reading."""
    found = sorted(path for pattern in INGREDIENTS for path in folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return [str(folder.resolve()), stats]
