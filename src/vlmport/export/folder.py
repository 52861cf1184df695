"""Write a folder all at once: it appears complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlmport.bundle import CARD, MANIFEST, read_manifest
from vlmport.errors import ExportError, some_names


@contextlib.contextmanager
def atomic_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without error.

    On any error, Ctrl-C included, the temporary folder is removed and `out` is as it was.
    Raises ExportError if `out` exists (without `force`), holds anything but a bundle (with it), or
    the disk is full.
    """
    check_target(out, force=force)
    new_parents = [parent for parent in out.parents if not parent.exists()]
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        yield partial
        partial.chmod(0o755)  # mkdtemp makes private folders
        check_target(out, force=force)  # another export may have been here first
        _replace(partial, out)
    except OSError as error:
        raise _explain(error, out) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not out.exists():
            for parent in new_parents:
                with contextlib.suppress(OSError):  # not empty, or never made
                    parent.rmdir()


def _explain(error: OSError, out: Path) -> ExportError:
    short_write = error.errno is None and " requested and " in str(error)  # numpy's, from tofile
    if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ExportError(
            f"{out}: the disk is full; nothing was left there",
            hint="free some space or export to another disk",
        )
    return ExportError(
        f"{error.filename or out}: {error.strerror or error}; nothing was left at {out}",
        hint="check the permissions, or choose another folder",
    )


def check_target(out: Path, *, force: bool) -> None:
    """Refuse early what would fail late. Raises ExportError."""
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise ExportError(f"{parent}: is a file, expected a folder", hint="choose another name")
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out}: is a file, expected a folder", hint="choose another name")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise ExportError(
            f"{out}: not empty and not a bundle; nothing in it is touched",
            hint="choose a new folder",
        )
    if not force:
        raise ExportError(f"{out}: there is a bundle already", hint="--force overwrites it")
    if foreign := _foreign(out):
        raise ExportError(
            f"{out}: holds {len(foreign)} files that are not the bundle's, so it is not "
            f"overwritten: {some_names(foreign, limit=4)}",
            hint="move them away, or export to a new folder",
        )


def _foreign(out: Path) -> list[str]:
    """Files below a bundle that its manifest does not list. Raises BundleError."""
    ours = {MANIFEST, CARD, *read_manifest(out / MANIFEST).files}
    found = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    return [name for name in found if name not in ours]


def check_space(out: Path, needed: int) -> None:
    """Raise ExportError if fewer than `needed` bytes are free where `out` will be."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ExportError(
            f"{out}: the disk is full: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free",
            hint="free some space or export to another disk",
        )


def _replace(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`; the old folder goes only when the new one is there."""
    if not out.exists():
        os.rename(partial, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        os.rename(out, aside / "bundle")
        os.rename(partial, out)
    except BaseException:  # Ctrl-C too: between the two renames `out` is nowhere
        if (aside / "bundle").exists() and not out.exists():
            os.rename(aside / "bundle", out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
