"""A folder of computed arrays that outlives the process: one safetensors file for each value.

Files are in a subfolder for what the numbers depend on: bundle, precision, device, and the versions
of ONNX Runtime and its plugins, and the machine. Each names its key and the hash of its contents. A
file that is damaged, or that is none of ours, is ignored with a warning, and replaced when its
value is kept again. One thread writes, so that nobody waits for that.

Traps:
- Several processes may share a folder: files appear in one step (rename), and may vanish.
- The time of the last use is the file's modification time.
- After a write that fails, such as on a full disk, nothing more is written; reading goes on.
- A process that is killed leaves the partial file that it wrote. Old ones are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime as ort

from vlmport.errors import CacheWarning, VlmportWarning, cut, quoted, warn
from vlmport.runtime.content_store import Arrays, Kept
from vlmport.runtime.engines.machine import environment, machine_key
from vlmport.runtime.graphs.components import Components

FORMAT = "1"
SUFFIX, PARTIAL = ".safetensors", ".part"
ABANDONED = 3600.0  # seconds after which nobody writes a partial file any more
MAX_BYTES = 4 * 1024**3
MAX_WAITING = 256  # values that wait to be written; more are not kept on disk
MAX_HEADER = 1 << 20
MAX_KNOWN = 1 << 16  # files that are known to be whole

Value = TypeVar("Value", bound=Kept)


class DiskStore:
    """Values in files, up to `max_bytes` of the whole folder; the least recently used go first."""

    def __init__(self, folder: Path, namespace: str, max_bytes: int = MAX_BYTES):
        """Args:
        folder: the folder, which is made when something is written.
        namespace: name of the subfolder, from `namespace_of`.
        max_bytes: maximum size of all files in the folder, those of other models included.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self._own = folder / namespace
        self._size: int | None = None  # of all files; None until the first write
        self._whole: set[bytes] = set()  # keys of files that this process read or wrote
        self._warned = False
        self._writes = True
        self._waiting: queue.Queue[tuple[bytes, Kept] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def get(self, key: bytes, read: Callable[[Arrays], Value]) -> Value | None:
        """Read a value; None where there is none, or where its file can't be used."""
        path = self._path(key)
        try:
            contents = path.read_bytes()
        except OSError:  # not there, or not ours to read
            return None
        try:
            value = read(_arrays(contents, key))
        except (ValueError, KeyError, TypeError) as error:
            said = f"{path} is ignored: {cut(str(error))}"
            self._warn(CacheWarning(said, code="cache.file-ignored"))
            return None
        self._whole.add(key)
        with contextlib.suppress(OSError):
            os.utime(path)
        return value

    def put(self, key: bytes, value: Kept) -> None:
        """Write a value soon, unless too many wait; one that is there becomes the newest."""
        if not self._writes or value.nbytes > self.max_bytes:
            return
        if key in self._whole:
            with contextlib.suppress(OSError):  # it is not there any more
                os.utime(self._path(key))
                return
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vlmport-disk", daemon=True)
                self._thread.start()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((key, value))

    def close(self) -> None:
        """Write what waits, and end the thread. A later `put` starts it again."""
        with self._starting:
            if self._thread is not None:
                self._waiting.put(None)
                self._thread.join()
                self._thread = None

    def _path(self, key: bytes) -> Path:
        return self._own / f"{key.hex()}{SUFFIX}"

    def _run(self) -> None:
        while (task := self._waiting.get()) is not None:
            if not self._writes:
                continue
            try:
                self._write(*task)
            except Exception as error:  # whatever it is, the thread goes on: `close` waits for it
                self._writes = False
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                said = f"{self.folder} can't be written: {cut(reason)}; "
                said += "nothing more is kept there"
                self._warn(CacheWarning(said, code="cache.unwritable"))

    def _write(self, key: bytes, value: Kept) -> None:
        path = self._path(key)
        if len(self._whole) >= MAX_KNOWN:
            self._whole.clear()
        # Not there, or not whole.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if _digest(_arrays(path.read_bytes(), key)) == _digest(value.arrays()):
                os.utime(path)
                self._whole.add(key)
                return
        contents = _contents(key, value.arrays())
        self._make_room(len(contents))
        self._own.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=PARTIAL, dir=self._own)
        try:
            with open(handle, "wb") as file:
                file.write(contents)
            os.replace(name, path)
            self._whole.add(key)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used files until there is room; looks at them now and then."""
        if self._size is None or self._size + needed > self.max_bytes:
            files = sorted(self._files(), key=lambda one: one[0])
            self._size = sum(size for _, size, _ in files)
            for _, size, path in files:
                if self._size + needed <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                self._size -= size
        self._size += needed

    def _files(self) -> list[tuple[float, int, Path]]:
        """List the folder's files with their times and sizes; remove abandoned partial files."""
        found, now = [], time.time()
        for path in (*self.folder.glob(f"*/*{SUFFIX}"), *self.folder.glob(f"*/*{PARTIAL}")):
            try:
                facts = path.stat()
                if path.suffix == PARTIAL:
                    if now - facts.st_mtime > ABANDONED:
                        path.unlink()
                    continue
            except OSError:  # another process removed it
                continue
            found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _warn(self, warning: CacheWarning) -> None:
        """Warn once: a folder that was damaged as a whole has thousands of files."""
        if self._warned:
            return
        self._warned = True
        with contextlib.suppress(VlmportWarning):  # an error by a filter: no request may fail
            warn(warning)


def namespace_of(components: Components) -> str:
    """Name what numbers depend on besides the content: bundle, precision, device, library, machine.

    Another kind of CPU has other kernels, which round in other places.
    """
    listed, engines = components.manifest.files, components.engines.values()
    plugins = {one.name: one.plugin.version() for one in engines if one.plugin is not None}
    facts = [
        FORMAT,
        sorted((name, entry.sha256) for name, entry in listed.items()),
        sorted(components.choice.items()),
        components.device,
        components.older_attention,
        sorted(plugins.items()),
        ort.__version__,
        machine_key(),
        environment(),
        components.threads,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _contents(key: bytes, arrays: Arrays) -> bytes:
    from safetensors.numpy import save

    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {"vlmport": FORMAT, "key": key.hex(), "sha256": _digest(plain)}
    return save(plain, metadata=facts)


def _arrays(contents: bytes, key: bytes) -> Arrays:
    """Read a file. Raises ValueError where it is damaged, or not the file of this key."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = int.from_bytes(contents[:8], "little")
    if len(contents) < 8 or size > min(MAX_HEADER, len(contents) - 8):
        raise ValueError("not a whole safetensors file")
    header = json.loads(contents[8 : 8 + size])
    facts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(facts, dict) or facts.get("vlmport") != FORMAT:
        raise ValueError("not written by this version of vlmport")
    if facts.get("key") != key.hex():
        raise ValueError(f"it is the file of key {quoted(facts.get('key'), 80)}")
    try:
        arrays = load(contents)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if facts.get("sha256") != _digest(arrays):
        raise ValueError("its contents are damaged")
    return arrays


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
