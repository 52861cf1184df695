"""Hash a bundle's files, whole and in chunks of 8 MiB; a browser downloads chunk by chunk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from vlmport.bundle.records import Schema

CHUNK_BYTES = 8 * 1024 * 1024
Sha256: TypeAlias = Annotated[str, Schema(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, SHA-256 of the whole and of each 8 MiB."""

    size: Annotated[int, Schema(minimum=0)]
    sha256: Sha256
    chunks: Annotated[tuple[Sha256, ...], Schema("SHA-256 of each 8 MiB in turn")]


def hash_file(path: Path) -> FileEntry:
    """Compute size, SHA-256 and chunk hashes of a file, which is read once."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            whole.update(block)
            chunks.append(hashlib.sha256(block).hexdigest())
            size += len(block)
    return FileEntry(size, whole.hexdigest(), tuple(chunks))
