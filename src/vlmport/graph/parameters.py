"""Parameters that know which tensor of the checkpoint they are made from, and how.

A module's attributes mirror the checkpoint's names, so a weight finds its tensor by its own
qualified name. A quantized matrix is two initializers made from one tensor:
`o_proj.weight_quantized` and `o_proj.weight_scales` both come from `o_proj.weight`. A packed one is
made from several: `qkv_proj.weight` from `q_proj.weight`, `k_proj.weight` and `v_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnxscript import nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, UInt8

SAFE_LEVEL = 64  # of an 8-bit weight that meets 8-bit activations, see quantize_columns
TINY = np.finfo(np.float32).tiny
CACHED = 1 << 16  # values that are converted at a time

Load = Callable[[], np.ndarray]
Convert = Callable[[Load], np.ndarray]


@dataclass(frozen=True)
class Format:
    """The storage and multiplication of a part's matrices, and the floats of all other values.

    Attributes:
        bits: None for floats, else 4 or 8 for integers.
        dynamic: 8-bit weights by column times 8-bit activations (W8A8), fast for many rows;
            otherwise integers are in blocks of a row with a scale each (MatMulNBits).
        block_size: of those blocks.
        dtype: float32 or float16, of scales, norms, biases and activations.
    """

    bits: int | None = None
    dynamic: bool = False
    block_size: int = 32
    dtype: ir.DataType = ir.DataType.FLOAT


FLOAT32 = Format()
FLOAT16 = Format(dtype=ir.DataType.FLOAT16)
INT8 = Format(bits=8)
INT8_FLOAT16 = Format(bits=8, dtype=ir.DataType.FLOAT16)
INT4 = Format(bits=4)
INT4_FLOAT16 = Format(bits=4, dtype=ir.DataType.FLOAT16)
W8A8 = Format(bits=8, dynamic=True)


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor of `shape` that a weight, or a part of it, is made from by `convert`.

    Attributes:
        module: the last part of its module's name, where the checkpoint's is not the graph's
            (`q_proj` in a packed `qkv_proj`).
    """

    shape: tuple[int, ...]
    convert: Convert = lambda load: load()
    module: str | None = None


class Weight(nn.Parameter):
    """An initializer of `shape`, made by `convert` from a checkpoint tensor of `source_shape`.

    Args:
        alias: the checkpoint's name for it in this module, if that is not the attribute's.
        dtype: stored type; float values that `convert` gives are rounded to it.
        sources: the tensors it is made from where they are several, laid side by side along `axis`;
            each is converted by itself, so its values are those that it would have alone.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        source_shape: Sequence[int] | None = None,
        convert: Convert | None = None,
        alias: str | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        sources: Sequence[Source] = (),
        axis: int = 0,
    ):
        super().__init__(shape, dtype=dtype)
        one = Source(tuple(shape if source_shape is None else source_shape))
        one = one if convert is None else replace(one, convert=convert)
        self.sources = tuple(sources) or (one,)
        self.axis = axis
        self.alias = alias

    @property
    def keys(self) -> tuple[str, ...]:
        """The checkpoint's full names of the sources; valid once the graph is built."""
        assert self.name is not None
        module, _, own = self.name.rpartition(".")
        parent, dot, name = module.rpartition(".")
        modules = [f"{parent}{dot}{source.module or name}" for source in self.sources]
        return tuple(".".join(filter(None, (one, self.alias or own))) for one in modules)


Quantize = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Quantizer:
    """A quantizer of one matrix, which runs when the first of its two initializers is needed.

    The second is kept until it is needed, so each matrix is read and rounded once, and no two
    matrices are in memory.
    """

    def __init__(self, quantize: Quantize):
        self.quantize = quantize
        self._pending: dict[str, np.ndarray] = {}

    def quantized(self, load: Load) -> np.ndarray:
        return self._take("quantized", load)

    def scales(self, load: Load) -> np.ndarray:
        return self._take("scales", load)

    def _take(self, half: str, load: Load) -> np.ndarray:
        if half not in self._pending:
            quantized, scales = self.quantize(load())
            self._pending = {"quantized": quantized, "scales": scales}
        return self._pending.pop(half)


def append_rows(matrix: Float[np.ndarray, "N K"], extra_rows: int) -> Float[np.ndarray, "M K"]:
    """The matrix with rows of zeros below."""
    return np.pad(matrix, ((0, extra_rows), (0, 0))) if extra_rows else matrix


def quantize_blocks(
    matrix: Float[np.ndarray, "N K"], form: Format
) -> tuple[UInt8[np.ndarray, "N blocks bytes"], Float[np.ndarray, "N blocks"]]:
    """Round to the nearest of 2^bits levels, symmetric, a scale for each block of a row.

    The layout is MatMulNBits': unsigned with the default zero point 2^(bits-1), two 4-bit values
    a byte with the lower index in the low nibble; a last block past K is filled with zeros. The
    scale maps the value farthest from zero, with its sign, onto the level -2^(bits-1), which has
    no positive twin: all levels are used (the scheme of GGML's q4_0).
    """
    assert form.bits in (4, 8)
    blocks = -(-matrix.shape[1] // form.block_size)
    quantized = np.empty((len(matrix), blocks, form.block_size * form.bits // 8), np.uint8)
    scales = np.empty((len(matrix), blocks), np.float32)
    for rows in _in_cache(matrix):
        quantized[rows], scales[rows] = _quantize_rows(matrix[rows], form)
    return quantized, scales


def _quantize_rows(
    matrix: Float[np.ndarray, "N K"], form: Format
) -> tuple[UInt8[np.ndarray, "N blocks bytes"], Float[np.ndarray, "N blocks"]]:
    assert form.bits in (4, 8)
    rows, columns = matrix.shape
    blocks = -(-columns // form.block_size)
    padded = np.zeros((rows, blocks * form.block_size), np.float32)
    padded[:, :columns] = matrix
    zero = 1 << (form.bits - 1)

    # numpy is five times slower along a short last axis than along the first.
    across = np.ascontiguousarray(padded.reshape(rows * blocks, form.block_size).T)
    high, low = across.max(axis=0, initial=-np.inf), across.min(axis=0, initial=np.inf)
    farthest = np.where(high > -low, high, low).reshape(rows, blocks)  # signed
    # Rounded as they are stored, before the levels are chosen with them.
    scales = (farthest / -zero).astype(form.dtype.numpy()).astype(np.float32)
    scales[np.abs(scales) < TINY] = 0  # the inverse would overflow
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    padded = padded.reshape(rows, blocks, form.block_size)
    padded *= inverse[:, :, None]
    levels = np.rint(padded, out=padded)
    np.clip(levels, -zero, zero - 1, out=levels)
    levels += zero
    unsigned = levels.astype(np.uint8)
    if form.bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return unsigned, scales


def quantize_columns(
    matrix: Float[np.ndarray, "N K"],
) -> tuple[Int8[np.ndarray, "K N"], Float[np.ndarray, " N"]]:
    """Round to 129 levels, symmetric, a scale for each output; transposed as MatMulInteger wants.

    Not to 255: x86 processors without VNNI add two products of an unsigned and a signed byte in
    16 bits, which saturates silently past 64 · 255 · 2.
    """
    quantized = np.empty(matrix.shape[::-1], np.int8)
    scales = np.empty(len(matrix), np.float32)
    for rows in _in_cache(matrix):
        part = matrix[rows]
        scale = np.abs(part).max(axis=1, initial=0).astype(np.float32) / SAFE_LEVEL
        scale[scale < TINY] = 1  # a column of nothing
        quantized[:, rows] = np.rint(part / scale[:, None]).T
        scales[rows] = scale
    return quantized, scales


def transposed(matrix: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "K N"]:
    """A contiguous copy."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for rows in _in_cache(matrix):
        result[:, rows] = matrix[rows].T
    return result


def _in_cache(matrix: np.ndarray) -> Iterator[slice]:
    """The rows, as many at a time as stay in a processor's cache: several times faster."""
    step = max(1, CACHED // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))
