"""The hashes of a bundle's files: of the whole, and of each 8 MiB, by which a browser downloads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, SHA-256 of the whole and of each 8 MiB."""

    size: int
    sha256: str
    chunks: tuple[str, ...]


def hash_file(path: Path) -> FileEntry:
    """Size, SHA-256 and chunk hashes of a file, read once."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            whole.update(block)
            chunks.append(hashlib.sha256(block).hexdigest())
            size += len(block)
    return FileEntry(size, whole.hexdigest(), tuple(chunks))
