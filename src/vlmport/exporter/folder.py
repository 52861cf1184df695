"""Write a folder atomically: it appears complete, or not at all.

A process that is killed leaves a folder next to it: `.NAME.partial-…` holds the files written so
far, `.NAME.old-…` holds the old folder NAME, for the moment between two renames. The next export to
the same place removes the first and puts the second back. A running export keeps its folders
locked; the lock ends with its process in any case. Without locks, as on Windows, age decides.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vlmport.bundle import CARD, MANIFEST, Bundle, read_manifest
from vlmport.errors import ExportError, ExportWarning, VlmportError, some_names, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OLD = "bundle"  # the name inside .NAME.old-…
ABANDONED_AFTER = 24 * 3600  # seconds, where folders can't be locked; no export takes that long


@contextlib.contextmanager
def atomic_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Make a temporary folder next to `out`, which replaces it when the block ends without error.

    On any error, Ctrl-C included, the temporary folder is removed and `out` is unchanged.
    Raises ExportError if `out` exists (without `force`), holds anything but a bundle (with it), or
    the disk is full.
    """
    recover(out)
    check_target(out, force=force)
    new_parents = [parent for parent in out.parents if not parent.exists()]
    with contextlib.ExitStack() as made:
        made.callback(_remove_empty, new_parents)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = made.enter_context(_own_folder(out, "partial"))
            yield partial
            partial.chmod(0o755)  # mkdtemp makes private folders
            check_target(out, force=force)  # another export may have finished first
            _replace(partial, out)
        except OSError as error:
            raise _explain(error, out) from error


def recover(out: Path) -> None:
    """Clean up after exports to `out` that were killed, and warn about each.

    A bundle that was moved away is put back if there is none in its place. It is only removed if
    there is a complete one. Folders of exports that still run are not touched.
    """
    names = re.compile(rf"\.{re.escape(out.name)}\.(partial|old)-\w+")
    with contextlib.suppress(OSError):  # no such folder, or one that can't be read
        for path in sorted(out.parent.iterdir()):
            if (found := names.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError), _locked(path) as abandoned:
                    if abandoned:
                        _clear(path, out, old=found[1] == "old")


def _clear(path: Path, out: Path, *, old: bool) -> None:
    """Remove or put back the folder of a killed export. Raises OSError if that fails."""
    aside = path / OLD
    if old and aside.is_dir() and any(aside.iterdir()):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            os.replace(aside, out)
            path.rmdir()
            _warn(
                f"{out}: restored; an export that was killed had moved it",
                code="export.bundle-restored",
            )
            return
        if not _is_whole(out):
            _warn(
                f"{aside}: kept, because it is the only complete copy of {out}",
                code="export.bundle-kept",
            )
            return
    shutil.rmtree(path)
    _warn(
        f"{path}: removed; an export that was killed had left it", code="export.leftovers-removed"
    )


def _warn(message: str, *, code: str) -> None:
    warn(ExportWarning(message, code=code))


def _is_whole(out: Path) -> bool:
    try:
        Bundle.open(out)
    except VlmportError:
        return False
    return True


@contextlib.contextmanager
def _own_folder(out: Path, kind: str) -> Iterator[Path]:
    """Make a new folder next to `out`, which is locked while the block runs, and then removed.

    It gets its name only when it is locked, so that no other process takes it for an abandoned one.
    """
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    folder = new.with_name(f".{out.name}.{kind}-{new.name[-8:]}")
    try:
        with _locked(new):
            os.rename(new, folder)
            yield folder
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if not (folder / OLD).exists() or _is_whole(out):  # else the only copy is in there
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, and yield whether that worked: no other process or thread has it locked.

    Without locks, yield whether the folder is old enough to be abandoned.
    """
    number = None
    try:
        if fcntl is not None:
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = fcntl is not None or time.time() - folder.stat().st_mtime > ABANDONED_AFTER
    except BlockingIOError:
        free = False
    except OSError:  # a file system without locks of folders
        free = time.time() - folder.stat().st_mtime > ABANDONED_AFTER
    try:
        yield free
    finally:
        if number is not None:
            os.close(number)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def _explain(error: OSError, out: Path) -> ExportError:
    short_write = error.errno is None and " requested and " in str(error)  # numpy's, from tofile
    if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ExportError(
            f"{out}: the disk is full; no partial export is left there",
            hint="free some space or export to another disk",
            code="export.disk-full",
        )
    return ExportError(
        f"{error.filename or out}: {error.strerror or error}; no partial export is left at {out}",
        hint="check the permissions, or choose another folder",
        code="export.unwritable",
    )


def check_target(out: Path, *, force: bool) -> None:
    """Check early that `out` can be written. Raises ExportError."""
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise ExportError(
                f"{parent}: is a file, expected a folder",
                hint="choose another name",
                code="export.target-taken",
            )
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(
            f"{out}: is a file, expected a folder",
            hint="choose another name",
            code="export.target-taken",
        )
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise ExportError(
            f"{out}: not empty and not a bundle; it is left unchanged",
            hint="choose a new folder",
            code="export.target-taken",
        )
    if not force:
        raise ExportError(
            f"{out}: a bundle exists already",
            hint="--force overwrites it",
            code="export.bundle-exists",
        )
    if foreign := _foreign(out):
        raise ExportError(
            f"{out}: holds {len(foreign)} files that are not the bundle's, so it is not "
            f"overwritten: {some_names(foreign, limit=4)}",
            hint="move them away, or export to a new folder",
            code="export.target-taken",
        )


def _foreign(out: Path) -> list[str]:
    """List files below a bundle that are not in its manifest. Raises BundleError."""
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
            code="export.disk-full",
        )


def _replace(partial: Path, out: Path) -> None:
    """Replace `out` by `partial`; the old folder is removed only when the new one is in place."""
    if not out.exists():
        os.rename(partial, out)
        return
    with _own_folder(out, "old") as aside:
        try:
            os.rename(out, aside / OLD)
            os.rename(partial, out)
        except BaseException:  # Ctrl-C too: between the two renames `out` is nowhere
            if (aside / OLD).exists() and not out.exists():
                os.rename(aside / OLD, out)
            raise
