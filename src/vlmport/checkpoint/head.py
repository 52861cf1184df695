"""Decide which matrix is a model's head: its own, or the embedding's.

Source: transformers 5.23, modeling_utils.py, `tie_weights`. The tensors count before the flag in
config.json: where both are stored and differ, each is used; the flag decides only where one of the
two is missing, and then the one that is there serves as both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmport.checkpoint.safetensors_file import READABLE, StoredTensor
from vlmport.checkpoint.weights import LazyTensor
from vlmport.errors import CheckpointWarning, warn

__all__ = ["HeadNames", "same_values"]

BLOCK = 1 << 22  # elements that are compared at once


@dataclass(frozen=True)
class HeadNames:
    """The names of embedding and head, and whether config.json ties the two."""

    embedding: str
    head: str
    tied: bool

    @classmethod
    def of(cls, model: str, tied: bool) -> HeadNames:
        """Return the names in a model whose tensors have the prefix `model` (may be empty)."""
        prefix = f"{model}." if model else ""
        return cls(f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight", tied)

    def resolve(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Return the tensors, with one object under both names if head and embedding are tied.

        Warns with CheckpointWarning where the flag ties two matrices that differ.
        """
        embedding, head = tensors.get(self.embedding), tensors.get(self.head)
        one = head if embedding is None else embedding
        if not self.tied or one is None:
            return dict(tensors)
        if head is not None and not same_values(one, head):
            warn(
                CheckpointWarning(
                    f"config.json ties the head to the embedding (tie_word_embeddings), but "
                    f"{head.name!r} is stored and differs from {one.name!r}: the stored head "
                    "is used, as in transformers 5",
                    code="checkpoint.head-differs",
                )
            )
            return dict(tensors)
        return {**tensors, self.embedding: one, self.head: one}

    def are_tied(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Return whether head and embedding are one matrix, after `resolve` and any merging."""
        head = tensors.get(self.head)
        return self.tied if head is None else head is tensors.get(self.embedding)


def same_values(a: LazyTensor, b: LazyTensor) -> bool:
    """Return whether two tensors hold the same numbers; tensors of one type are read in blocks."""
    if a is b:
        return True
    if tuple(a.shape) != tuple(b.shape):
        return False
    if not isinstance(a, StoredTensor) or not isinstance(b, StoredTensor):
        return np.array_equal(a.numpy(), b.numpy())
    if a.dtype != b.dtype or a.dtype not in READABLE:
        return np.array_equal(a.numpy(), b.numpy())
    dtype = READABLE[a.dtype]
    count = a.nbytes // dtype.itemsize
    return all(
        _same_block(a, b, dtype, at, min(BLOCK, count - at)) for at in range(0, count, BLOCK)
    )


def _same_block(a: StoredTensor, b: StoredTensor, dtype: np.dtype, at: int, count: int) -> bool:
    start = at * dtype.itemsize
    left, right = (np.fromfile(t.file, dtype, count, offset=t.offset + start) for t in (a, b))
    if left.tobytes() == right.tobytes():
        return True
    return np.array_equal(left.astype(np.float32), right.astype(np.float32))  # -0.0 is 0.0
