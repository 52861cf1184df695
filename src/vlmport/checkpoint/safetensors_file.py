"""A tensor in a safetensors file: its entry in the header, and its bytes.

Tensors are read with a plain read rather than through a memory map: a mapped file that shrinks, or
whose disk fails, kills the process, while a short read is an error with a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vlmport.errors import WeightError

READABLE = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# The types that quantized weights consist of.
PACKED = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DOWNLOAD_AGAIN = "the file is incomplete or damaged; download it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, `offset` bytes from its start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int

    def numpy(self) -> npt.NDArray[np.float32]:
        """Read it; float32 holds every value of the readable types exactly.

        Raises WeightError for another type, and when the file is gone or has become shorter.
        """
        if self.dtype not in READABLE:
            raise WeightError(
                f"{self.file}: {self.name!r} is {self.dtype}, expected {', '.join(READABLE)}",
                hint="save the model in float32"
                if self.dtype == "F64"
                else "quantized checkpoints can't be exported; use the original model",
                code="weights.type",
            )
        return self.raw().astype(np.float32, copy=False)

    def raw(self) -> npt.NDArray[Any]:
        """Read it in its own type. Raises WeightError as `numpy` does."""
        dtype = READABLE.get(self.dtype) or PACKED.get(self.dtype)
        if dtype is None:
            raise WeightError(
                f"{self.file}: {self.name!r} is {self.dtype}, which vlmport does not read",
                hint="use the original model, before it was quantized",
                code="weights.type",
            )
        count = self.nbytes // dtype.itemsize
        try:
            values = np.fromfile(self.file, dtype, count, offset=self.offset)
        except OSError as cause:
            raise WeightError(
                f"{self.file}: {self.name!r}: {cause}",
                hint=DOWNLOAD_AGAIN,
                code="weights.unreadable",
            ) from cause
        if values.size != count:
            got = f"expected {self.nbytes} bytes, got {values.nbytes}"
            raise WeightError(
                f"{self.file}: {self.name!r}: {got}", hint=DOWNLOAD_AGAIN, code="weights.unreadable"
            )
        try:
            return values.reshape(self.shape)
        except ValueError as cause:  # no elements, and too many of them in the other dimensions
            what = f"{self.name!r} of shape {list(self.shape)[:8]} can't be an array"
            raise WeightError(
                f"{self.file}: {what}", hint=DOWNLOAD_AGAIN, code="weights.unreadable"
            ) from cause
