"""Keep rows of the cache by the prompt that they were computed from, for later requests.

A row is kept in blocks of tokens. The key of a block is a hash of everything before its end: token
ids and, under image tokens, the images. So prompts that begin alike share blocks, and no other
prompt finds them.

What is reused changes no token:

- At fp32 and q4 the decoder gives a token the same numbers in each chunk, unless it is alone in a
  tile of the attention (prefill.py). Blocks have 16 tokens, and at least 2 tokens of a prompt are
  always run.
- At q8 activations are scaled by chunk, and float16 rounds by it. There a block is a whole chunk
  of 192 tokens, and a prompt reuses it where it has a chunk of its own at that place. So all its
  chunks are those that it has alone. A last chunk of 96 to 287 tokens is always run.
- On other devices than the CPU nothing is reused: their kernels depend on the size of a chunk.

Only prompts are kept, not answers: their tokens were run one at a time, which differs in the last
bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.runtime.content_store import Arrays, ContentStore
from vlmport.runtime.graphs.cache import SavedRow, prompt_cuts
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.decoder import Decoder
from vlmport.runtime.preparing import ReusablePrefix
from vlmport.runtime.scheduling.prefill import cut_freely_until

if TYPE_CHECKING:
    from jaxtyping import Int64

BLOCK = 16
LEFT = 2  # tokens of a prompt that are always run


@dataclass(frozen=True)
class Block:
    """Keys and values of some tokens of a row: one array [K, tokens, head_dim] for each tensor."""

    tensors: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def arrays(self) -> dict[str, np.ndarray]:
        return {str(n): tensor for n, tensor in enumerate(self.tensors)}


class PrefixCache:
    """Blocks of prompts in a store."""

    def __init__(self, components: Components, store: ContentStore):
        self._components, self._store = components, store

    @property
    def _decoder(self) -> Decoder:
        return self._components.decoder

    def _ends(self, length: int) -> list[int]:
        """Return where the blocks of a prompt end that a prompt of this length shares exactly."""
        if not self._decoder.on_host:
            return []
        if self._decoder.rounds_by_call:
            return prompt_cuts(length)[1:-1]
        return [*range(BLOCK, length + 1, BLOCK)]

    def find(
        self, ids: Int64[np.ndarray, " S"], image_rows: Sequence[bytes]
    ) -> ReusablePrefix | None:
        """Return the longest kept row that a prompt begins with; None if there is none."""
        ends = self._ends(len(ids))
        if not self._decoder.rounds_by_call:
            until = min(len(ids) - LEFT, cut_freely_until(self._decoder, len(ids)))
            ends = [end for end in ends if end <= until]
        keys, found = self._keys(ids, image_rows, ends), []
        for key, (start, end) in zip(keys, _spans(ends), strict=True):
            block = self._store.get(key, Block, lambda arrays, n=end - start: self._read(arrays, n))
            if block is None:
                break
            found.append(block)
        if not found:
            return None
        length = ends[len(found) - 1]
        tensors = zip(*(block.tensors for block in found), strict=True)
        row = SavedRow(length, 0, tuple(np.concatenate(parts, axis=1) for parts in tensors))
        token = self._components.manifest.prompt.image_token_id
        images = int((ids[:length] == token).sum())
        return ReusablePrefix(row, ids[:length], tuple(image_rows[:images]))

    def keep(
        self, ids: Int64[np.ndarray, " S"], image_rows: Sequence[bytes], row: SavedRow
    ) -> None:
        """Keep the blocks of a prompt that are not kept yet.

        Args:
            row: keys and values of the whole prompt; they are copied.
        """
        ends = self._ends(len(ids))
        keys, fresh = self._keys(ids, image_rows, ends), {}
        for key, (start, end) in zip(keys, _spans(ends), strict=True):
            if key not in self._store:
                fresh[key] = Block(tuple(one[:, start:end].copy() for one in row.tensors))
        # The last block first: the first one, which more prompts share, is then the newest.
        self._store.put(dict(reversed(fresh.items())))
        self._store.touch(reversed(keys))

    def _keys(
        self, ids: Int64[np.ndarray, " S"], image_rows: Sequence[bytes], ends: Sequence[int]
    ) -> list[bytes]:
        """Return the key of each block: a hash of all tokens and images up to its end."""
        is_image = ids == self._components.manifest.prompt.image_token_id
        before = np.concatenate([[0], np.cumsum(is_image)])
        digest, keys = hashlib.sha256(b"prefix"), []
        for start, end in _spans(ends):
            digest.update(np.ascontiguousarray(ids[start:end], np.int64).tobytes())
            for image in image_rows[before[start] : before[end]]:
                digest.update(image)
            keys.append(digest.digest())
        return keys

    def _read(self, arrays: Arrays, tokens: int) -> Block:
        """Make a block of the arrays in a file. Raises ValueError for those of another model."""
        ports = self._decoder.ports
        want = {str(n): (port.heads, tokens, port.head_dim) for n, port in enumerate(ports)}
        kinds = {str(n): port.dtype for n, port in enumerate(ports)}
        if {name: array.shape for name, array in arrays.items()} != want:
            raise ValueError(f"not {tokens} tokens of this model")
        if {name: array.dtype for name, array in arrays.items()} != kinds:
            raise ValueError("tensors of another type")
        return Block(tuple(arrays[str(n)] for n in range(len(ports))))


def _spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends][: len(ends)], ends, strict=True))
