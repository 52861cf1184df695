"""Qwen's smart resize: sides of whole blocks, and a number of pixels within limits.

Source: transformers 5.23, image_processing_pil_qwen2_vl.py, smart_resize. Each side is rounded to
a multiple of the factor f, halves to even. If that makes too many pixels, or too few, both sides
are divided or multiplied by β = sqrt(pixels / limit), and cut down or up to multiples of f.

All is computed with integers: no graph may use float64 (WebGPU builds of ONNX Runtime lack it), and
float32 is wrong once in ten thousand sizes. A side h becomes the whole part of sqrt(h max / w) / f,
which integers know. But where that is a whole number k, Python's doubles may fall short of it, or
go past it, and the side is a block less or more: 19 x 19 with at least 3136 pixels is 84 x 84, not
56 x 56. `_misses` follows the doubles through those cases.

The maths of it: let m = k f be the new side without errors, so that β is the fraction h / m (or
m / h, when the image grows). Powers of two don't matter to doubles: let P / Q be that fraction
brought into [1, 2). Its square is rounded to 53 bits: by S / Q² of a unit in the last place, and
that moves the root by S 2^x / (2 P Q) units, where x is 1 if the square is 2 or more, else 0. The
root is rounded again, so β is R / Q units (2^-52) off, where R follows from the remainders of P and
P² times powers of two. A β that is too large makes the side m ± j units of m's last place, and
dividing that by f gives k or not, as j units of m are less or more than half a unit of k, times f.
Where the side is not whole without errors, it is too far from whole for doubles to matter: by
1 / (2 h max) of itself, and they err by 4 / 2^53.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmport.graph.builder import OpBuilder
from vlmport.graph.refusal import refuse

__all__ = ["SmartResize"]

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
MOST_RATIO = 200  # of the sides
MOST_SIDE = 65_536  # of the new image: the resizer's integers hold up to here
MOST_LEAST = 1 << 26  # no image is made larger than this
UNLIMITED = 1 << 28  # an image that is read has fewer pixels, even with rounded sides
POWERS = 1 << np.arange(62, dtype=np.int64)


@dataclass(frozen=True)
class SmartResize:
    """A resize that makes the sides of an image multiples of `factor`."""

    factor: int

    def sides_of(self, height: int, width: int, least: int, most: int) -> tuple[int, int]:
        """Compute the new height and width of an image, for `least` to `most` pixels."""
        factor, sides = self.factor, (height, width)
        new = [round(side / factor) * factor for side in sides]
        if math.prod(new) > most:
            shrink = math.sqrt(height * width / most)
            new = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
        elif math.prod(new) < least:
            grow = math.sqrt(least / (height * width))
            new = [math.ceil(side * grow / factor) * factor for side in sides]
        return new[0], new[1]

    def sides(
        self, op: OpBuilder, height: ir.Value, width: ir.Value, least: ir.Value, most: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Compute the same in a graph: int64 [1] each.

        The graph refuses sides that differ too much, as the original does, and limits that no
        image can have.
        """
        longer, shorter = op.Max(height, width), op.Min(height, width)
        height = refuse(
            op,
            height,
            op.Greater(longer, op.Mul(shorter, MOST_RATIO)),
            f"one side is more than {MOST_RATIO} times the other",
            "the model takes no such picture; cut it into parts",
        )
        for when, reason, hint in (
            (op.Less(least, 1), "min_pixels is less than 1", "1 sets no limit"),
            (
                op.Greater(least, most),
                "min_pixels is more than max_pixels",
                "give both, or see the bundle's image_options for the one that was not given",
            ),
            (
                op.Greater(least, MOST_LEAST),
                f"min_pixels is more than {MOST_LEAST}",
                "pictures are made larger to have so many pixels; what was meant?",
            ),
        ):
            height = refuse(op, height, when, reason, hint)
        new_height, new_width = self.whole_blocks(op, height, width, least, most)
        new_height = refuse(
            op,
            new_height,
            op.Greater(op.Max(new_height, new_width), MOST_SIDE),
            f"a side would become more than {MOST_SIDE} pixels",
            "give a smaller min_pixels",
        )
        return new_height, new_width

    def whole_blocks(
        self, op: OpBuilder, height: ir.Value, width: ir.Value, least: ir.Value, most: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Compute the new sides, int64, element by element; the input is one that `sides` takes."""
        sides, f = (height, width), self.factor
        most = op.Min(most, UNLIMITED)
        rounded = [op.Mul(_round_half_even(op, side, f), f) for side in sides]
        pixels = op.Mul(*rounded)
        is_large, is_small = op.Greater(pixels, most), op.Less(pixels, least)
        new = []
        for side, other, nearest in zip(sides, sides[::-1], rounded, strict=True):
            shrunk, grown = self._shrunk(op, side, other, most), self._grown(op, side, other, least)
            new.append(op.Where(is_large, shrunk, op.Where(is_small, grown, nearest)))
        return new[0], new[1]

    def _shrunk(self, op: OpBuilder, side: ir.Value, other: ir.Value, most: ir.Value) -> ir.Value:
        """max(f, floor(side / β / f) f)."""
        f, total = self.factor, op.Mul(side, most)
        k = _root(op, op.Div(total, op.Mul(other, f * f)))
        is_whole = op.Equal(op.Mul(op.Mul(k, k), op.Mul(other, f * f)), total)
        k = op.Max(k, 1)
        m = op.Mul(k, f)
        P, R, _ = _beta(op, side, m)
        s, t = _log2(op, m), _log2(op, k)
        # Below a power of two, doubles are twice as close.
        c_m, c_k = (_count(op, op.Equal(x, _power(op, e))) for x, e in ((m, s), (k, t)))
        moved = op.Mul(op.Mul(op.Mul(m, R), 2), _power(op, c_m))
        unit = op.Mul(P, _power(op, s))
        j = _sum(op, *(op.Greater(moved, op.Mul(unit, odd)) for odd in (1, 3, 5)))
        steps = op.Mul(j, _power(op, op.Add(op.Sub(s, t), op.Add(op.Sub(c_k, c_m), 1))))
        misses = op.And(is_whole, op.Greater(steps, f))
        return op.Mul(op.Max(op.Sub(k, _count(op, misses)), 1), f)

    def _grown(self, op: OpBuilder, side: ir.Value, other: ir.Value, least: ir.Value) -> ir.Value:
        """ceil(side β / f) f."""
        f, total = self.factor, op.Mul(side, least)
        area = op.Mul(other, f * f)
        k = op.Add(
            _root(op, op.Div(op.Sub(total, 1), area)), 1
        )  # the least with k² >= total / area
        is_whole = op.Equal(op.Mul(op.Mul(k, k), area), total)
        m = op.Mul(k, f)
        _, R, e = _beta(op, m, side)
        s, t = _log2(op, m), _log2(op, k)
        moved, unit = op.Mul(R, 2), _power(op, op.Sub(s, op.Min(e, 0)))
        j = _sum(
            op,
            op.Greater(moved, unit),
            op.GreaterOrEqual(moved, op.Mul(unit, 3)),  # a tie goes to the even neighbour
            op.Greater(moved, op.Mul(unit, 5)),
        )
        steps = op.Mul(j, _power(op, op.Add(op.Sub(s, t), 1)))
        misses = op.And(is_whole, op.Greater(steps, f))
        return op.Mul(op.Add(k, _count(op, misses)), f)


def _beta(op: OpBuilder, p: ir.Value, q: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Compute P, R and e for β = p / q: P / Q = β / 2^e in [1, 2), its double is R / Q units more.

    For sides below 2^18, so that all products modulo Q² fit into an int64.
    """
    e = op.Where(
        op.GreaterOrEqual(p, q),
        _log2(op, op.Div(p, q)),
        op.Neg(op.Add(_log2(op, op.Div(op.Sub(q, 1), p)), 1)),
    )
    P = op.Mul(p, _power(op, op.Neg(op.Min(e, 0))))
    Q = op.Mul(q, _power(op, op.Max(e, 0)))
    P2, Q2 = op.Mul(P, P), op.Mul(Q, Q)
    x = _count(op, op.GreaterOrEqual(P2, op.Mul(Q2, 2)))
    left = _times_power(op, op.Mod(P2, Q2), op.Sub(52, x), Q2)
    S = op.Where(op.Less(op.Mul(left, 2), Q2), op.Neg(left), op.Sub(Q2, left))
    rest = _times_power(op, op.Mod(P, Q), op.Constant(value_ints=[52]), Q)
    # More than half a unit, moved by the square's rounding.
    is_up = op.Greater(op.Add(op.Mul(op.Mul(rest, P), 2), op.Mul(S, _power(op, x))), op.Mul(P, Q))
    return P, op.Sub(op.Where(is_up, Q, op.Constant(value_ints=[0])), rest), e


def _round_half_even(op: OpBuilder, side: ir.Value, factor: int) -> ir.Value:
    """round(side / factor)."""
    below, rest = op.Div(side, factor), op.Mul(op.Mod(side, factor), 2)
    is_half_of_odd = op.And(op.Equal(rest, factor), op.Equal(op.Mod(below, 2), 1))
    return op.Add(below, _count(op, op.Or(op.Greater(rest, factor), is_half_of_odd)))


def _root(op: OpBuilder, n: ir.Value) -> ir.Value:
    """Compute the whole part of sqrt(n), for 0 <= n < 2^40: float32 is off by one at most."""
    near = op.Cast(op.Sqrt(op.Cast(n, to=FLOAT)), to=INT64)
    near = op.Sub(near, _count(op, op.Greater(op.Mul(near, near), n)))
    above = op.Add(near, 1)
    return op.Add(near, _count(op, op.LessOrEqual(op.Mul(above, above), n)))


def _times_power(op: OpBuilder, x: ir.Value, exponent: ir.Value, modulus: ir.Value) -> ir.Value:
    """x 2^exponent modulo the modulus, for x < modulus < 2^36 and exponents to 52."""
    for _ in range(2):  # 2^26 each, or less: 2^36 2^26 < 2^63
        part = op.Min(exponent, 26)
        x = op.Mod(op.Mul(x, _power(op, part)), modulus)
        exponent = op.Sub(exponent, part)
    return x


def _log2(op: OpBuilder, x: ir.Value) -> ir.Value:
    """Compute the whole part of log2(x), for 1 <= x < 2^40."""
    powers = op.Constant(value=ir.tensor(POWERS[:40]))
    reached = op.GreaterOrEqual(op.Unsqueeze(x, [-1]), powers)
    return op.Sub(op.ReduceSum(op.Cast(reached, to=INT64), [-1], keepdims=0), 1)


def _power(op: OpBuilder, exponent: ir.Value) -> ir.Value:
    """2^exponent, int64."""
    return op.Gather(op.Constant(value=ir.tensor(POWERS)), exponent)


def _count(op: OpBuilder, condition: ir.Value) -> ir.Value:
    """Turn a condition into 1 or 0."""
    return op.Cast(condition, to=INT64)


def _sum(op: OpBuilder, first: ir.Value, *others: ir.Value) -> ir.Value:
    """Count the conditions that hold."""
    total = _count(op, first)
    for other in others:
        total = op.Add(total, _count(op, other))
    return total
