"""The coefficients of Pillow's resize, computed in the graph with integers.

Source of the maths: Pillow 13.0, src/libImaging/Resample.c: `precompute_coeffs` (which inputs an
output reads, and with what weights), `normalize_coeffs_8bpc` (weights as multiples of 2^-22) and
the three filter functions. Pillow computes in double precision and then rounds to integers;
here every quantity is an integer or an exact fraction from the start.

Dimensions, for one axis: I inputs, O outputs, M = max(I, O), G blocks of b outputs each, of which
one reads K neighbouring inputs, its window. The last block repeats the last output.

Sizes: for M up to MAX_SIDE nothing overflows an int64. The weights are exact for bicubic while
16 M^4 / O < 2^49 or so (I = 4000 down to O = 8, I = 16,384 down to 2,048); beyond, they are rounded
to more than 48 bits, about as much as Pillow's doubles keep.

Traps:
    - Integer Div truncates towards zero; dividends that can be negative are shifted first where
      that matters.
    - Sign of an int64 sees its low 32 bits only in ONNX Runtime 1.31. Compare with 0 instead.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmport.errors import ConfigError
from vlmport.graph.builder import OpBuilder

MAX_SIDE = 65_536  # runtimes refuse larger images
DIGIT = 256  # the base of the two digits that a coefficient is cut into

# The weights of one output are kept below 2^51 in sum: 12 more bits fit while they are divided.
BICUBIC_LIMIT_BITS = 49
LANCZOS_BITS = 40  # the weights' fixed point
LANCZOS_OFFSET_BITS = 30
LANCZOS_SEGMENTS = 256  # cubics for each unit of x


class Resample(enum.IntEnum):
    """A filter, by the code that PIL and `resample` in preprocessor_config.json use."""

    LANCZOS = 1
    BILINEAR = 2
    BICUBIC = 3

    @property
    def support(self) -> int:
        """Half the filter's width: in inputs when enlarging, in outputs when shrinking."""
        return {Resample.BILINEAR: 1, Resample.BICUBIC: 2, Resample.LANCZOS: 3}[self]

    @classmethod
    def _missing_(cls, value: object) -> Resample:
        known = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in cls)
        raise ConfigError(
            f"resample: expected {known}, got {value!r}",
            hint="the model was trained with a filter that vlmport does not write",
            code="config.unsupported-value",
        )


@dataclass(frozen=True)
class Axis:
    """The values that the pass along one axis needs."""

    size_in: ir.Value  # i64 [1], I
    size_out: ir.Value  # i64 [1], O
    taps: ir.Value  # i64 [1]: no output reads more inputs than this
    window: ir.Value  # i64 [1], K
    start: ir.Value  # i64 [G]: the first input of each window
    digits: ir.Value  # f32 [G, 2, b, K]: coefficient = 256 (high + low), low in [-1/2, 1/2)


def pillow_axis(
    op: OpBuilder, size_in: ir.Value, size_out: ir.Value, resample: Resample, block: int
) -> Axis:
    """Pillow's coefficients for one axis (precompute_coeffs), in blocks of `block` outputs.

    The distance between the centres of an input and an output, in units of the filter, is the
    fraction n / d with n = |(2 input + 1) O - (2 output + 1) I| and d = 2 M.
    """
    larger = op.Max(size_in, size_out)
    reach = op.Mul(larger, 2 * resample.support)  # the filter's whole width in inputs, times O
    taps = op.Add(op.Div(reach, size_out), 2)
    window = op.Add(op.Div(op.Add(op.Mul(size_in, block - 1), reach), size_out), 3)
    window = op.Min(window, size_in)

    count = op.Div(op.Add(size_out, block - 1), block)
    output = op.Range(0, op.Squeeze(op.Mul(count, block)), 1)
    output = op.Reshape(op.Min(output, op.Sub(size_out, 1)), [-1, block])  # [G, b]
    centre = op.Mul(op.Add(op.Mul(output, 2), 1), size_in)  # times 2 O
    start = op.Add(op.Sub(op.Gather(centre, [0], axis=1), reach), size_out)
    start = op.Div(op.Max(start, 0), op.Mul(size_out, 2))
    start = op.Min(start, op.Sub(size_in, window))  # [G, 1]

    position = op.Add(start, op.Range(0, op.Squeeze(window), 1))  # [G, K]
    position = op.Mul(op.Add(op.Mul(position, 2), 1), size_out)  # centre, times 2 O
    n = op.Abs(op.Sub(op.Unsqueeze(position, [1]), op.Unsqueeze(centre, [2])))  # [G, b, K]
    weights = _weights(op, n, op.Mul(larger, 2), size_out, resample)
    digits = _digits(op, _normalise(op, weights))
    return Axis(size_in, size_out, taps, window, op.Squeeze(start, [1]), digits)


def _weights(
    op: OpBuilder, n: ir.Value, d: ir.Value, size_out: ir.Value, resample: Resample
) -> ir.Value:
    """The filter at n / d, times any constant: i64, the shape of n.

    Pillow's bounds of an output's taps need no separate test: they are |x| < support.
    """
    inside = op.Less(n, op.Mul(d, resample.support))
    n = op.Where(inside, n, 0)
    if resample is Resample.BILINEAR:
        value = op.Sub(d, n)
    elif resample is Resample.BICUBIC:
        value = _bicubic(op, n, d, size_out)
    else:
        value = _lanczos(op, n, d, size_out)
    return op.Where(inside, value, 0)


def _bicubic(op: OpBuilder, n: ir.Value, d: ir.Value, size_out: ir.Value) -> ir.Value:
    """bicubic_filter, times 2 d^3 while that is not too large."""
    d2 = op.Mul(d, d)
    d3 = op.Mul(d2, d)
    n2 = op.Mul(n, n)
    n3 = op.Mul(n2, n)
    n2_d = op.Mul(op.Mul(n2, d), 5)
    near = op.Add(op.Sub(op.Mul(n3, 3), n2_d), op.Mul(d3, 2))
    far = op.Sub(op.Add(n2_d, op.Mul(d3, 4)), op.Add(n3, op.Mul(op.Mul(n, d2), 8)))
    value = op.Where(op.Less(n, d), near, far)
    # The sum is about 2 d^3 M / O = d^4 / O.
    excess = op.Div(op.Mul(op.Div(d3, 1 << 20), d), op.Mul(size_out, 1 << BICUBIC_LIMIT_BITS - 20))
    return op.Div(value, op.Add(excess, 1))


def _lanczos(op: OpBuilder, n: ir.Value, d: ir.Value, size_out: ir.Value) -> ir.Value:
    """lanczos_filter, times 2^40 while that is not too large; off by 2^-36 at most."""
    scaled = op.Mul(n, LANCZOS_SEGMENTS)
    segment = op.Div(scaled, d)
    rest = op.Sub(scaled, op.Mul(segment, d))
    offset = op.Mul(op.Sub(op.Mul(rest, 2), d), 1 << LANCZOS_OFFSET_BITS - 1)
    offset = op.Div(offset, d)  # in [-1/2, 1/2)
    constant, *powers = (
        op.Gather(op.Constant(value=ir.tensor(row)), segment) for row in lanczos_table()
    )
    value = powers.pop()
    for coefficient in (*reversed(powers), constant):
        value = op.Div(op.Mul(value, offset), 1 << LANCZOS_OFFSET_BITS)
        value = op.Add(value, coefficient)
    # The sum is about 2^40 M / O = 2^40 d / 2 O.
    return op.Div(value, op.Add(op.Div(d, op.Mul(size_out, 1 << 50 - LANCZOS_BITS + 1)), 1))


def lanczos_table() -> np.ndarray:
    """Cubics that follow sinc(x) sinc(x / 3) on each 1/256 of [0, 3] within 2^-37.

    int64 [4, 768], lowest power first, in units of 2^-40; the variable runs from -1/2 to 1/2
    within a segment. Fitted by least squares at 16 Chebyshev points, so nearly the best there is.
    """
    u = np.cos(np.pi * (np.arange(16) + 0.5) / 16) / 2
    x = (np.arange(3 * LANCZOS_SEGMENTS)[:, None] + 0.5 + u) / LANCZOS_SEGMENTS
    powers = np.vander(u, 4, increasing=True)
    cubics = np.linalg.lstsq(powers, (np.sinc(x) * np.sinc(x / 3)).T, rcond=None)[0]
    return np.round(cubics * 2.0**LANCZOS_BITS).astype(np.int64)


def _normalise(op: OpBuilder, weights: ir.Value) -> ir.Value:
    """Weights over their sum, as multiples of 2^-22 (normalize_coeffs_8bpc): i64 [G, b, K].

    Long division in two steps of 11 bits; halves are rounded away from zero, as Pillow does.
    """
    total = op.ReduceSum(weights, [2], keepdims=1)
    scaled = op.Mul(op.Abs(weights), 1 << 11)
    high = op.Div(scaled, total)
    rest = op.Sub(scaled, op.Mul(high, total))
    low = op.Div(op.Add(op.Mul(rest, 1 << 12), total), op.Mul(total, 2))
    value = op.Add(op.Mul(high, 1 << 11), low)
    return op.Where(op.Less(weights, 0), op.Neg(value), value)


def _digits(op: OpBuilder, coefficients: ir.Value) -> ir.Value:
    """Cut coefficients, i64 [G, b, K], into two digits: f32 [G, 2, b, K]; see `Axis`."""
    offset = 1 << 24  # makes the dividend positive: a coefficient is at most 1.2, times 2^22
    high = op.Div(op.Add(coefficients, offset + DIGIT // 2), DIGIT)
    high = op.Sub(high, offset // DIGIT)
    low = op.Sub(coefficients, op.Mul(high, DIGIT))
    low = op.Mul(op.Cast(low, to=ir.DataType.FLOAT), 1 / DIGIT)
    high = op.Cast(high, to=ir.DataType.FLOAT)
    return op.Concat(op.Unsqueeze(high, [1]), op.Unsqueeze(low, [1]), axis=1)
