"""Weights that are read on request, and weights computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["DerivedTensor", "LazyTensor"]


class LazyTensor(Protocol):
    """A weight that is read on request.

    Attributes:
        name: its name in the file, for messages.
        shape, dtype: as stored ("F32", "F16", "BF16", …).
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def numpy(self) -> npt.NDArray[np.float32]:
        """Read its values into a new float32 array, which the caller owns. Raises WeightError."""
        ...


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor computed from `base` when it is read; a subclass adds `shape` and `numpy`.

    Its name and stored type are those of the base.
    """

    base: LazyTensor

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def dtype(self) -> str:
        return self.base.dtype
