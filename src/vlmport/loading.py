"""Open a model from any source: a built-in name, a bundle, a checkpoint or a Hub id.

A checkpoint is exported once, into the user's cache (bundle/cache.py), and found there the next
time. From a bundle on the Hub, only the graphs that will run are downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.builtin import CAPTIONER, builtin_folder, builtin_models
from vlmport.bundle import DEFAULT_PRECISIONS, MANIFEST, SUFFIXES, Bundle, is_bundle, read_manifest
from vlmport.bundle.cache import cache_folder, entry_name, open_entry, prune
from vlmport.bundle.downloads import check_once
from vlmport.bundle.precisions import canonical, split_precisions
from vlmport.checkpoint.source import fetch_files, find_folder, locate_adapter
from vlmport.errors import BundleError, OptionError, did_you_mean
from vlmport.runtime.engines.tuned import find_tuning
from vlmport.runtime.graphs.devices import choose_forms, parse_engines
from vlmport.runtime.images.features import MAX_BYTES
from vlmport.runtime.model import VLM

if TYPE_CHECKING:
    from vlmport.exporter import Progress

__all__ = ["builtin_models", "cache_folder", "load", "open_bundle", "resolve", "to_export"]


def load(
    source: str | Path = CAPTIONER,
    *,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    image_cache_bytes: int = MAX_BYTES,
    verify_hashes: bool | None = None,
    tune: bool = True,
) -> VLM:
    """Open a model: a built-in name, a bundle, a checkpoint folder or a Hub id.

        model = vlmport.load("shapes")
        model = vlmport.load("my-finetune", precision="q8", threads=4)

    A checkpoint is exported first, once, into the user's cache.

    Args:
        source: a built-in name (`builtin_models`), the folder of a bundle or of a checkpoint, or a
            Hub id such as 'org/name' (default: the built-in captioner 'shapes').
        precision: 'auto' (default: the bundle's choice for the device), 'fp32', 'fp16', 'q8', 'q4',
            'q4f16', or a mix such as 'vision=fp32,decoder=q4'.
        device: 'auto' (default: what `vlmport tune` has found, else the CPU), 'cpu', 'cuda',
            'cuda:1', 'openvino:bf16', …, as far as it is installed, or a mix such as
            'vision=openvino:bf16,decoder=cpu' (docs/engines.md).
        threads: number of threads of ONNX Runtime; None for one per core.
        adapter: a PEFT folder or Hub id, whose LoRA is merged into a checkpoint at export.
        revision: branch, tag or commit of a Hub id.
        progress: called during a first export with (done bytes, total bytes, file).
        image_cache_bytes: maximum size in bytes of the cache of encoded images (default 256 MB,
            0 = none).
        verify_hashes: True compares all files of a bundle with the SHA-256 in its manifest. None
            (default) does it for a bundle from the Hub, once for each file. False never does.
        tune: take what `vlmport tune` has found on this machine, where precision, device and
            threads are not given (default True).

    Returns:
        The model. Threads may share it, see VLM.

    Raises:
        SourceError: the source is not found, or can't be downloaded.
        ConfigError, WeightError, AdapterError, TokenizerError, ExportError: a checkpoint that can't
            be exported.
        BundleError: the bundle is damaged, or lacks the precision.
        DeviceError: the device is not available here, or computes a component wrongly.
        OptionError: a number is out of its range, or an adapter is given for a bundle.
    """
    tuned = tune and precision == device == "auto" and threads is None
    place = "cpu" if device == "auto" else device
    bundle = resolve(
        source,
        precisions=_needed(precision),
        runs=(precision, device if tuned else place),
        adapter=adapter,
        revision=revision,
        progress=progress,
        verify_hashes=verify_hashes,
    )
    return VLM.open(
        bundle,
        precision=precision,
        device=place,
        threads=threads,
        image_cache_bytes=image_cache_bytes,
        tuning=find_tuning(bundle.manifest) if tuned else None,
    )


def resolve(
    source: str | Path,
    *,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    runs: tuple[str, str] | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    verify_hashes: bool | None = None,
) -> Bundle:
    """Find the bundle of a source; export a checkpoint into the cache unless it is there.

    Args:
        source: as for `load`.
        precisions: which precisions to export of a checkpoint.
        runs: (precision, device) that will run; device 'auto' is what `vlmport tune` has found.
            From a bundle on the Hub, only their graphs are downloaded. None downloads all.
        adapter, revision, progress, verify_hashes: as for `load`.

    Raises as `export` and `Bundle.open` do.
    """
    folder = find_folder(builtin_folder(source) or source, revision, known=builtin_models())
    local = Path(source).expanduser().exists()
    if is_bundle(folder):
        if adapter is not None:
            raise OptionError(
                f"{source}: an adapter can't be merged into a bundle",
                hint="export the checkpoint again with --adapter",
                code="source.is-bundle",
            )
        if not local:
            return _open_remote(str(source), folder, runs, verify_hashes)
        return Bundle.open(folder, check_hashes=bool(verify_hashes))
    adapter_folder = None if adapter is None else locate_adapter(adapter)
    name = folder.resolve().name if local else str(source)
    return _exported(folder, adapter_folder, precisions, name, progress)


def _exported(
    folder: Path,
    adapter: Path | None,
    precisions: Sequence[str],
    name: str,
    progress: Progress | None,
) -> Bundle:
    """Open the bundle of a checkpoint in the cache; export it there first unless it is there."""
    out = cache_folder() / entry_name(folder, adapter, precisions)
    if (cached := open_entry(out)) is not None:
        return cached
    from vlmport.exporter import export  # takes a second to import, and most runs don't need it

    try:
        if out.exists():
            shutil.rmtree(out)  # it is damaged, and in the cache
        bundle = export(
            folder,
            out,
            precisions=None if tuple(precisions) == DEFAULT_PRECISIONS else precisions,
            adapter=adapter,
            name=name,
            progress=progress,
        )
    except Exception:
        # Another process may have exported the same in the meantime: use its bundle.
        if (cached := open_entry(out)) is not None:
            return cached
        raise
    prune(out)
    return bundle


def open_bundle(
    bundle: Bundle | str | Path,
    *,
    precisions: Sequence[str] = (),
    progress: Progress | None = None,
) -> Bundle:
    """Open a bundle, its folder, or a built-in model, which is exported into the cache.

    Args:
        bundle: a bundle, its folder, or a built-in name.
        precisions: names or mixes that will be used of it.
        progress: called during an export, as for `load`.

    Raises as `resolve` does.
    """
    if isinstance(bundle, Bundle):
        return bundle
    if builtin_folder(bundle) is None:
        if not _exists(bundle):
            raise BundleError(
                f"{bundle}: no such folder{did_you_mean(str(bundle), builtin_models())}",
                hint="check the path; `vlmport models` lists the built-in names",
                code="source.not-found",
            )
        return Bundle.open(bundle)
    return resolve(bundle, precisions=to_export(precisions), progress=progress)


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


def to_export(names: Sequence[str]) -> tuple[str, ...]:
    """Choose the precisions to export of a checkpoint that is used at these, or mixes of them."""
    plain = [name for name in names if "=" not in name and name != "auto"]
    return split_precisions([*DEFAULT_PRECISIONS, *plain])


def _open_remote(
    repo: str, folder: Path, runs: tuple[str, str] | None, verify_hashes: bool | None
) -> Bundle:
    """Open a bundle on the Hub; so far only the small files at its root are downloaded.

    The rest is downloaded at the same commit, which is the name of the snapshot's folder. Raises
    BundleError before any download for a precision that the bundle does not hold.
    """
    manifest = read_manifest(folder / MANIFEST)
    needed = tuple(manifest.files)
    if runs is not None:
        precision, device = runs
        if device == "auto":
            tuning = find_tuning(manifest)
            precision, device = (tuning.precision, tuning.device) if tuning else (precision, "cpu")
        engines = parse_engines(device, manifest.components)
        needed = manifest.files_of(choose_forms(manifest, precision, engines))
    fetched = fetch_files(repo, folder.name, needed)
    bundle = Bundle.open(fetched, check_hashes=bool(verify_hashes), needed=needed)
    if verify_hashes is None:
        check_once(bundle, needed)
    return bundle


def _needed(precision: str) -> tuple[str, ...]:
    """Choose the precisions to export of a checkpoint for this request.

    One that is named is exported alone: it may be the only one that the model allows.
    """
    if (name := canonical(precision)) in SUFFIXES:
        return (name,)
    mixed = (canonical(part.partition("=")[2]) for part in precision.split(","))
    return tuple(dict.fromkeys([*DEFAULT_PRECISIONS, *(one for one in mixed if one in SUFFIXES)]))
