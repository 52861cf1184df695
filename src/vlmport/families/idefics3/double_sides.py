"""Compute int(length / (width / height)) as Python's doubles do, with integers.

Processors written in Python keep an image's aspect ratio in doubles, and cut the other side to
a whole number. Where the exact side is whole, the doubles may fall just short of it, and it is one
less: 2048 / (2048 / 93) is 92.99999999999999. No graph may use float64 (WebGPU builds of ONNX
Runtime lack it), so the rounding of the ratio is followed in integers.

The maths: let the ratio width / height lie in [2^x, 2^(x+1)). Its double is q / 2^(52 - x), with
q = (width 2^(52-x) + r) / height and |r| < height / 2 (halves can't occur: a power of two as large
divides every side). A whole side k in [2^e, 2^(e+1)) comes out as k - 1 where the ratio's
error moves it by more than half the distance to the next lower double, 2^(e-53), or half of that
where k = 2^e. Where the side is not whole it is at least 1 / 2^27 away from whole numbers, and the
errors of doubles, about 2^-40 here, can't matter.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

__all__ = ["other_side"]

LARGEST = 27  # sides below 2^27: images have at most 100 million pixels
POWERS = 1 << np.arange(63, dtype=np.int64)


def other_side(op: OpBuilder, length: ir.Value, width: ir.Value, height: ir.Value) -> ir.Value:
    """Compute the shorter side of an image of this shape whose longer side gets a new length.

    Source: transformers 5.23, image_processing_pil_idefics3.py, which has
    `int(length / (width / height))` for width >= height and `int(length * (width / height))` else.

    Args:
        length, width, height: int64 [1]; the length is below 2^20.

    Returns int64 [1].
    """
    is_wide = op.GreaterOrEqual(width, height)
    shorter = op.Where(is_wide, height, width)
    longer = op.Where(is_wide, width, height)
    product = op.Mul(length, shorter)
    side = op.Div(product, longer)  # k
    is_whole = op.Equal(op.Mul(side, longer), product)

    x = _log2(op, width, height)
    e = _log2(op, side, op.Constant(value_ints=[1]))
    r = _rounding(op, width, height, op.Sub(52, x))
    shortfall = op.Where(is_wide, r, op.Neg(r))  # a larger ratio makes a smaller quotient
    is_power = op.Equal(side, _power(op, e))
    scale = op.Add(op.Max(x, 0), op.Where(is_power, 2, 1))
    moved = op.Mul(op.Mul(side, shortfall), _power(op, scale))
    half_step = op.Mul(width, _power(op, op.Sub(e, op.Min(x, 0))))
    falls = op.And(is_whole, op.Greater(moved, half_step))
    return op.Sub(side, op.Cast(falls, to=ir.DataType.INT64))


def _log2(op: OpBuilder, numerator: ir.Value, denominator: ir.Value) -> ir.Value:
    """x with 2^x <= numerator / denominator < 2^(x+1); of no use for 0."""
    powers = op.Constant(value=ir.tensor(POWERS[: LARGEST + 1]))
    is_reached = op.GreaterOrEqual(numerator, op.Mul(denominator, powers))
    is_below = op.Less(op.Mul(numerator, powers), denominator)
    above = op.ReduceSum(op.Cast(is_reached, to=ir.DataType.INT64), keepdims=1)
    below = op.ReduceSum(op.Cast(is_below, to=ir.DataType.INT64), keepdims=1)
    return op.Where(op.Greater(below, 0), op.Neg(below), op.Sub(above, 1))


def _rounding(op: OpBuilder, width: ir.Value, height: ir.Value, bits: ir.Value) -> ir.Value:
    """r with q height = width 2^bits + r, where q is the nearest whole number to their quotient."""
    first = op.Min(bits, 40)
    power = op.Mul(
        op.Mod(_power(op, first), height), op.Mod(_power(op, op.Sub(bits, first)), height)
    )
    rest = op.Mod(op.Mul(op.Mod(width, height), op.Mod(power, height)), height)
    return op.Where(op.Less(op.Mul(rest, 2), height), op.Neg(rest), op.Sub(height, rest))


def _power(op: OpBuilder, exponent: ir.Value) -> ir.Value:
    """2^exponent, int64."""
    return op.Gather(op.Constant(value=ir.tensor(POWERS)), exponent)
