"""Merge LoRA while reading: W + (α/r)·B·A, one tensor at a time.

Two sources have the same maths: pairs inside a checkpoint, for which the family gives r and α, and
a folder saved by PEFT. The semantics are those of peft 0.21: tuners/lora/layer.py (`update_layer`,
`get_delta_weight`) and utils/other.py (`get_pattern_key`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmport.checkpoint.lazy_tensor import DerivedTensor, LazyTensor
from vlmport.checkpoint.weights import Weights
from vlmport.errors import AdapterError

__all__ = ["LoraScale", "MergedTensor", "merge_pairs", "merge_stored"]

BLOCK = 1 << 22  # elements of W that one product covers, so that B·A is never whole in memory

Pair = tuple[LazyTensor, LazyTensor]


@dataclass(frozen=True)
class LoraScale:
    """The rank and the strength of an adapter.

    Attributes:
        r, alpha: the update is (alpha / r)·B·A.
        rslora: divide by √r instead of r.
    """

    r: int
    alpha: float
    rslora: bool = False

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True)
class MergedTensor(DerivedTensor):
    """A base weight [out, in] with A [r, in] and B [out, r] added to it when it is read.

    A convolution's is [out, in, *kernel] with A [r, in, *kernel] and B [out, r, 1, …]: flattened,
    it is the same product (peft 0.21, tuners/lora/layer.py, `_ConvNd.get_delta_weight`).
    """

    a: LazyTensor
    b: LazyTensor
    scale: LoraScale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def numpy(self) -> npt.NDArray[np.float32]:
        """Compute W + (α/r)·B·A in float32, in blocks of rows."""
        merged = self.base.numpy().reshape(self.shape[0], -1)
        a, b = (half.numpy().reshape(half.shape[0], -1) for half in (self.a, self.b))
        factor = np.float32(self.scale.factor)
        step = max(1, BLOCK // max(1, merged.shape[1]))
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            merged[rows] += (b[rows] @ a) * factor
        return merged.reshape(self.shape)


def merge_stored(weights: Weights, scale: LoraScale | None) -> dict[str, LazyTensor]:
    """Map plain name → weight, with the pairs inside the checkpoint merged.

    Raises AdapterError when there are pairs and no scale, or when their shapes don't fit.
    """
    if weights.pairs and scale is None:
        raise AdapterError(
            f"{weights.where}: {len(weights.pairs)} LoRA pairs, and no r and alpha for them",
            hint="merge them first: peft's merge_and_unload(), then save_pretrained()",
            code="adapter.unmerged",
        )
    if scale is None:
        return dict(weights)
    scales = dict.fromkeys(weights.pairs, scale)
    return merge_pairs(weights, weights.pairs, scales, weights.where)


def merge_pairs(
    tensors: Mapping[str, LazyTensor],
    pairs: Mapping[str, Pair],
    scales: Mapping[str, LoraScale],
    where: str,
) -> dict[str, LazyTensor]:
    """Merge each pair into the weight of its name.

    Raises AdapterError naming every pair whose shapes don't fit its weight and its r.
    """
    problems = [
        problem
        for name in sorted(pairs)
        if (problem := _misfit(name, tensors[name], pairs[name], scales[name]))
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise AdapterError(
            f"{where}: {len(problems)} of {len(pairs)} LoRA pairs don't fit: {shown}",
            hint="was the adapter trained on another model, or with another r?",
            code="adapter.not-of-this-model",
        )
    merged = {name: MergedTensor(tensors[name], *pairs[name], scales[name]) for name in pairs}
    return {**tensors, **merged}


def _misfit(name: str, base: LazyTensor, pair: Pair, scale: LoraScale) -> str | None:
    """Describe the fault in the shapes of a pair; None if there is none."""
    a, b = pair
    if len(base.shape) not in (2, 4, 5):  # Linear, Conv2d, Conv3d
        return f"{name!r} is {list(base.shape)}, expected a matrix or a convolution's kernel"
    out, *features = base.shape
    shapes = [scale.r, *features], [out, scale.r, *[1] * (len(base.shape) - 2)]
    if (list(a.shape), list(b.shape)) == shapes:
        return None
    expected = f"A {shapes[0]} and B {shapes[1]}"
    return f"{name!r}: expected {expected}, got A {list(a.shape)} and B {list(b.shape)}"
