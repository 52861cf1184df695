"""Keep computed arrays by the content that they were computed from, within a budget of bytes.

Image features and prefix rows of the cache share one store, so the least recently used of both goes
first. A store may have a folder (disk_store.py), which outlives the process: what is not in memory
is read from there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from vlmport.runtime.disk_store import DiskStore

Arrays = Mapping[str, np.ndarray]


class Kept(Protocol):
    """A value of a store. Nobody may change its arrays."""

    @property
    def nbytes(self) -> int:
        """Size of its arrays in bytes."""
        ...

    def arrays(self) -> Arrays:
        """Return its arrays by name, to be written to a file."""
        ...


Value = TypeVar("Value", bound=Kept)


class ContentStore:
    """The most recently used values, up to `max_bytes`; 0 keeps none. Threads may share it.

    Attributes:
        max_bytes: maximum size in bytes of the values in memory.
        disk: the folder behind it; None without.
    """

    def __init__(self, max_bytes: int, disk: DiskStore | None = None):
        self.max_bytes, self.disk = max_bytes, disk
        self._values: OrderedDict[bytes, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes, kind: type[Value], read: Callable[[Arrays], Value]) -> Value | None:
        """Return the value of a key, which becomes the most recently used; None without one.

        Args:
            kind: the type of the value. A value of another type does not count.
            read: makes a value of the arrays in a file; raises ValueError, KeyError or TypeError
                for arrays that are not those of such a value.
        """
        with self._lock:
            found = self._values.get(key)
            if isinstance(found, kind):
                self._values.move_to_end(key)
                return found
        if self.disk is None or (value := self.disk.get(key, read)) is None:
            return None
        self._add({key: value})
        return value

    def __contains__(self, key: bytes) -> bool:
        """Whether a value is in memory."""
        with self._lock:
            return key in self._values

    def put(self, values: Mapping[bytes, Kept]) -> None:
        """Keep values, the last of them as the most recently used, in memory and in the folder."""
        self._add(values)
        if self.disk is not None:
            for key, value in values.items():
                self.disk.put(key, value)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Make values in memory the most recently used ones, the last of them most of all; their
        files too, which are written again where the folder had no room for them."""
        touched = {}
        with self._lock:
            for key in keys:
                if key in self._values:
                    self._values.move_to_end(key)
                    touched[key] = self._values[key]
        if self.disk is not None:
            for key, value in touched.items():
                self.disk.put(key, value)

    def _add(self, values: Mapping[bytes, Kept]) -> None:
        fitting = {key: value for key, value in values.items() if value.nbytes <= self.max_bytes}
        if not fitting:
            return
        with self._lock:
            for key, value in fitting.items():
                self._values[key] = value
                self._values.move_to_end(key)
            size = self._size()  # summed each time, so that an interrupt can't leave a wrong count
            while size > self.max_bytes:
                size -= self._values.popitem(last=False)[1].nbytes

    @property
    def nbytes(self) -> int:
        """Size of the values in memory, in bytes."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(value.nbytes for value in self._values.values())

    def clear(self) -> None:
        """Remove all values from memory; files stay."""
        with self._lock:
            self._values.clear()

    def close(self) -> None:
        """Remove all values from memory, and wait until those of the folder are written."""
        self.clear()
        if self.disk is not None:
            self.disk.close()
