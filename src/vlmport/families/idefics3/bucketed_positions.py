"""Find the row of a position table for each patch, if the rows are buckets of fractions.

Source: transformers 5.23, Idefics3VisionEmbeddings.forward. A complete tile needs no mask, so the
rows are known at export: the table is written in the order of the patches.

Traps:
- Fractions and boundaries are float32, and a fraction that should equal its boundary may be below
  it. With as many patches as rows, the buckets are the identity for 32 per side, but not for 19,
  25, 29, 31 or 38.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmport.checkpoint.lazy_tensor import DerivedTensor

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

LANES = 8  # float32 values that PyTorch steps together on x86


def bucketed_positions(patches: int, side: int) -> Int64[np.ndarray, " N"]:
    """Find the row of the table [side², D] for each of patches² patches: the fraction of its axis
    at which a patch is, looked up among the boundaries between the table's rows."""
    fractions = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
    fractions = np.minimum(fractions, np.float32(1 - 1e-6))
    bucket = np.searchsorted(_boundaries(side), fractions, side="right")
    return (bucket[:, None] * side + bucket).reshape(-1)


def _boundaries(side: int) -> Float32[np.ndarray, " n"]:
    """Compute torch.arange(1 / side, 1, 1 / side), bit for bit.

    Eight values at a time are computed from one that is rounded to float32 already, as long as
    sixteen are left; each of the rest is computed alone. The buckets of 31 patches depend on that.
    """
    step = 1 / side
    at = np.arange(int(np.ceil((1 - step) / step)))
    first = (step + step * (at // LANES * LANES)).astype(np.float32).astype(np.float64)
    together = (first + step * (at % LANES)).astype(np.float32)
    alone = (step + step * at).astype(np.float32)
    return np.where(at < len(at) // (2 * LANES) * (2 * LANES), together, alone)


@dataclass(frozen=True)
class PickedRows(DerivedTensor):
    """Some rows of a tensor, in an order of their own."""

    rows: Int64[np.ndarray, " N"] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.base.shape[1:])

    def numpy(self) -> Float32[np.ndarray, "N ..."]:
        return self.base.numpy()[self.rows]
