"""Image.resize of Pillow 13, bit for bit, as a sub-graph.

Vision-language models are trained on pixels that Pillow resized, and other resizers differ by
several grey levels. Pillow's own arithmetic is integer and needs no float64, so it can be
written in ONNX: two passes, each a weighted sum along one axis, rounded to uint8 between them.

Source of the maths: Pillow 13.0, src/libImaging/Resample.c: `precompute_coeffs`,
`normalize_coeffs_8bpc`, `ImagingResampleHorizontal_8bpc`, `ImagingResampleVertical_8bpc`, and the
order of the passes in `ImagingResample`.

Dimensions, for one axis: I inputs, O outputs, M = max(I, O), G blocks of b outputs each, of which
one reads K neighbouring inputs. C is the length of a row: width times three channels.

Traps:
    - Pillow 13 changed the order of the passes. It shows: the intermediate picture is rounded.
    - Integer Div truncates towards zero; every dividend that can be negative is shifted first.
    - Sign of an int64 looks at its low 32 bits only in ONNX Runtime 1.31: compare with 0 instead.
    - Names inside a subgraph must differ from those outside it: see `_scope`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmport.graph.builder import OpBuilder

__all__ = ["PILLOW_VERSION", "Resample", "resize"]

PILLOW_VERSION = "13"  # the major version whose pixels the graph equals

ROWS, COLUMNS = -2, -1  # the axis of an image [height, C] along which a pass goes
CHANNELS = 3

DIGIT = 256  # a coefficient is two digits of this base, each exact in a float32 sum
MAX_TAPS = 512  # ... of this many: 512 * 255 * 128 < 2^24


class Resample(enum.IntEnum):
    """A filter, by the code that PIL and `resample` in preprocessor_config.json use."""

    LANCZOS = 1
    BILINEAR = 2
    BICUBIC = 3

    @property
    def support(self) -> int:
        """Half the filter's width, in inputs when enlarging, in outputs when shrinking."""
        return {Resample.BILINEAR: 1, Resample.BICUBIC: 2, Resample.LANCZOS: 3}[self]


@dataclass(frozen=True)
class Axis:
    """What one pass needs to know: sizes, and the coefficients of each block of outputs."""

    size_in: ir.Value  # i64 [1], I
    size_out: ir.Value  # i64 [1], O
    taps: ir.Value  # i64 [1]: no output has more coefficients
    window: ir.Value  # i64 [1], K
    start: ir.Value  # i64 [G]: the first input that each block reads
    digits: ir.Value  # f32 [G, 2b, K]: the high digits of b outputs, then their low digits / 256


def resize(
    op: OpBuilder,
    image: ir.Value,
    height: ir.Value | int,
    width: ir.Value | int,
    resample: Resample,
) -> ir.Value:
    """Resize as `PIL.Image.resize((width, height), resample)` does on an RGB image.

    Args:
        op: the dispatcher to write with.
        image: uint8 [H, W, 3], neither side 0.
        height, width: the new size, int64 scalars or Python integers, at least 1.
        resample: the filter.

    Returns:
        uint8 [height, width, 3].
    """
    resample = Resample(resample)
    with _scope(op, _unique_name(op)):
        size = op.Shape(image, end=2)
        rows = _axis(op, op.Slice(size, [0], [1]), op.Reshape(height, [1]), resample)
        columns = _axis(op, op.Slice(size, [1], [2]), op.Reshape(width, [1]), resample)
        flat = op.Reshape(image, [0, -1])  # [H, C]

        def vertical_first(op: OpBuilder) -> ir.Value:
            return _pass(op, _pass(op, flat, rows, ROWS), columns, COLUMNS)

        def horizontal_first(op: OpBuilder) -> ir.Value:
            return _pass(op, _pass(op, flat, columns, COLUMNS), rows, ROWS)

        lost_rows = op.Sub(rows.size_in, rows.size_out)
        lost_columns = op.Sub(columns.size_in, columns.size_out)
        order = op.And(op.Greater(lost_rows, 0), op.Greater(lost_rows, op.Mul(lost_columns, 2)))
        resized = _if(op, order, vertical_first, horizontal_first)
        return op.Reshape(resized, op.Concat(rows.size_out, columns.size_out, [CHANNELS], axis=0))


# One pass.


def _pass(op: OpBuilder, image: ir.Value, axis: Axis, along: int) -> ir.Value:
    """Resize one axis of a uint8 image [R, C]; an axis that keeps its size is left alone."""

    def unchanged(op: OpBuilder) -> ir.Value:
        return op.Identity(image)

    def changed(op: OpBuilder) -> ir.Value:
        return _if(op, op.Greater(axis.taps, MAX_TAPS), many_taps, few_taps)

    def few_taps(op: OpBuilder) -> ir.Value:
        return _few_taps(op, image, axis, along)

    def many_taps(op: OpBuilder) -> ir.Value:
        return _many_taps(op, image, axis, along)

    with _scope(op, "rows" if along == ROWS else "columns"):
        return _if(op, op.Equal(axis.size_in, axis.size_out), unchanged, changed)


def _few_taps(op: OpBuilder, image: ir.Value, axis: Axis, along: int) -> ir.Value:
    """The pass, one block of outputs after the other, so that only its window is ever float32.

    Exact: the sums of both digits stay below 2^24 (`MAX_TAPS`).
    """
    matrices = _matrices(op, axis, along)

    def body(op: OpBuilder, block: ir.Value, unused: ir.Value) -> list[ir.Value]:
        start = op.Gather(axis.start, op.Reshape(block, [1]), axis=0)
        digits = _window_sums(
            op, image, op.Gather(matrices, block, axis=0), start, axis.window, along
        )
        high, low = op.Split(digits, axis=along, num_outputs=2, _outputs=2)
        return [op.Identity(unused), _to_uint8(op, op.Add(high, op.Floor(low)))]

    blocks = _loop(op, op.Size(axis.start), body, ir.DataType.UINT8)
    return _join_blocks(op, blocks, axis, along)


def _many_taps(op: OpBuilder, image: ir.Value, axis: Axis, along: int) -> ir.Value:
    """The pass where a picture shrinks so far that the sum of one output's digits is too long.

    Each window is cut into pieces of `MAX_TAPS` inputs, whose sums are exact and few; the carry
    from the low digit to the high one is taken after the pieces are added up.
    """
    matrices = _matrices(op, axis, along)
    pieces = op.Div(op.Add(axis.window, MAX_TAPS - 1), MAX_TAPS)

    def body(op: OpBuilder, step: ir.Value, unused: ir.Value) -> list[ir.Value]:
        block = op.Div(op.Reshape(step, [1]), pieces)
        skipped = op.Mul(op.Mod(op.Reshape(step, [1]), pieces), MAX_TAPS)
        length = op.Min(op.Sub(axis.window, skipped), [MAX_TAPS])
        matrix = op.Squeeze(op.Gather(matrices, block, axis=0), [0])
        taps_axis, per_tap = (1, 1) if along == ROWS else (0, CHANNELS)
        matrix = op.Slice(
            matrix,
            op.Mul(skipped, per_tap),
            op.Mul(op.Add(skipped, length), per_tap),
            [taps_axis],
        )
        start = op.Add(op.Gather(axis.start, block, axis=0), skipped)
        return [op.Identity(unused), _window_sums(op, image, matrix, start, length, along)]

    steps = op.Mul(op.Size(axis.start), pieces)
    sums = _loop(op, steps, body, ir.DataType.FLOAT)
    shape = op.Concat([-1], pieces, op.Shape(sums, start=1), axis=0)
    sums = op.Reshape(sums, shape)  # [G, pieces, ...]
    high, low = op.Split(sums, axis=along, num_outputs=2, _outputs=2)
    carry = op.Floor(low)
    high = op.ReduceSum(op.Add(high, carry), [1], keepdims=0)
    low = op.ReduceSum(op.Sub(low, carry), [1], keepdims=0)
    return _join_blocks(op, _to_uint8(op, op.Add(high, op.Floor(low))), axis, along)


def _window_sums(
    op: OpBuilder,
    image: ir.Value,
    matrix: ir.Value,
    start: ir.Value,
    length: ir.Value,
    along: int,
) -> ir.Value:
    """Weighted sums, float32, of `length` rows or columns from `start`: [2b, C] or [R, 6b]."""
    if along == COLUMNS:
        start, length = op.Mul(start, CHANNELS), op.Mul(length, CHANNELS)
    window = op.Cast(op.Slice(image, start, op.Add(start, length), [along]), to=ir.DataType.FLOAT)
    return op.MatMul(matrix, window) if along == ROWS else op.MatMul(window, matrix)


def _matrices(op: OpBuilder, axis: Axis, along: int) -> ir.Value:
    """The coefficients as factors of a MatMul: [G, 2b, K] for rows, [G, 3K, 6b] for columns.

    Columns hold three channels side by side, so each coefficient becomes a 3x3 diagonal: zeros
    to multiply, but nothing to transpose.
    """
    if along == ROWS:
        return axis.digits
    columns = op.Transpose(axis.digits, perm=[0, 2, 1])  # [G, K, 2b]
    columns = op.Unsqueeze(columns, [2, 4])  # [G, K, 1, 2b, 1]
    eye = op.Reshape(op.EyeLike(op.ConstantOfShape([3, 3])), [1, 1, 3, 1, 3])
    spread = op.Mul(columns, eye)  # [G, K, 3, 2b, 3]
    dims = op.Shape(axis.digits)
    shape = op.Concat(
        op.Slice(dims, [0], [1]),
        op.Mul(op.Slice(dims, [2], [3]), 3),
        op.Mul(op.Slice(dims, [1], [2]), 3),
        axis=0,
    )
    return op.Reshape(spread, shape)


def _to_uint8(op: OpBuilder, sums: ir.Value) -> ir.Value:
    """Pillow's clip8: (sum + half) >> 22, clipped to a byte; `sums` are integers times 2^8.

    QuantizeLinear divides, rounds half to even and saturates in one go. Pillow rounds half up,
    so the divisor is two units in the last place short of 2^14: enough to lift every half, not
    enough (2^-15 at most) to lift the next lower sum, 2^-14 away.
    """
    divisor = np.float32(2**14 - 2**-9)
    return op.QuantizeLinear(sums, float(divisor), op.Constant(value=ir.tensor(np.uint8(0))))


def _join_blocks(op: OpBuilder, blocks: ir.Value, axis: Axis, along: int) -> ir.Value:
    """[G, b, C] to [O, C], or [G, R, 3b] to [R, 3 O]: the last block may be too long."""
    if along == ROWS:
        joined = op.Reshape(blocks, op.Concat([-1], op.Shape(blocks, start=2), axis=0))
        return op.Slice(joined, [0], axis.size_out, [0])
    rows = op.Transpose(blocks, perm=[1, 0, 2])  # [R, G, 3b]
    joined = op.Reshape(rows, [0, -1])
    return op.Slice(joined, [0], op.Mul(axis.size_out, CHANNELS), [1])


# The coefficients.


def _axis(op: OpBuilder, size_in: ir.Value, size_out: ir.Value, resample: Resample) -> Axis:
    """Pillow's coefficients for one axis, in integers (precompute_coeffs).

    The distance from an output's centre to an input's, in units of the filter, is the fraction
    n / D with n = |(2 input + 1) O - (2 output + 1) I| and D = 2 M.
    """
    support = resample.support
    block = op.Constant(value=ir.tensor([16]))
    larger = op.Max(size_in, size_out)
    reach = op.Mul(larger, 2 * support)  # the filter's whole width in inputs, times O
    taps = op.Add(op.Div(reach, size_out), 2)
    window = op.Add(op.Mul(op.Sub(block, 1), size_in), op.Add(reach, op.Sub(size_out, 1)))
    window = op.Min(op.Add(op.Div(window, size_out), 2), size_in)

    count = op.Mul(op.Div(op.Add(size_out, op.Sub(block, 1)), block), block)
    output = op.Min(op.Range(0, op.Squeeze(count), 1), op.Sub(size_out, 1))  # [G b]
    centre = op.Mul(op.Add(op.Mul(output, 2), 1), size_in)  # times 2 O
    centre = op.Reshape(centre, op.Concat([-1], block, axis=0))  # [G, b]
    first = op.Gather(centre, [0], axis=1)  # [G, 1]
    start = op.Max(op.Add(op.Sub(first, reach), size_out), 0)
    start = op.Min(op.Div(start, op.Mul(size_out, 2)), op.Sub(size_in, window))  # [G, 1]

    position = op.Add(start, op.Range(0, op.Squeeze(window), 1))  # [G, K]
    position = op.Mul(op.Add(op.Mul(position, 2), 1), size_out)
    n = op.Abs(op.Sub(op.Unsqueeze(position, [1]), op.Unsqueeze(centre, [2])))  # [G, b, K]
    weights = _filter(op, n, op.Mul(larger, 2), size_out, resample)
    return Axis(
        size_in,
        size_out,
        taps,
        window,
        op.Squeeze(start, [1]),
        _digits(op, _normalise(op, weights)),
    )


def _filter(
    op: OpBuilder, n: ir.Value, d: ir.Value, size_out: ir.Value, resample: Resample
) -> ir.Value:
    """The filter at n / d, times a constant, as integers whose sum stays below 2^51."""
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
    """bicubic_filter (a = -1/2) times 2 d^3."""
    d2 = op.Mul(d, d)
    d3 = op.Mul(d2, d)
    n2 = op.Mul(n, n)
    n3 = op.Mul(n2, n)
    n2_d = op.Mul(op.Mul(n2, d), 5)
    near = op.Add(op.Sub(op.Mul(n3, 3), n2_d), op.Mul(d3, 2))
    far = op.Sub(op.Add(n2_d, op.Mul(d3, 4)), op.Add(n3, op.Mul(op.Mul(n, d2), 8)))
    value = op.Where(op.Less(n, d), near, far)
    # The sum is about 2 d^3 (d / 2 O): for 4000 inputs below 2^50 down to 4 outputs.
    excess = op.Div(op.Mul(op.Div(d3, 1 << 20), d), op.Mul(size_out, 1 << 29))
    return op.Div(value, op.Add(excess, 1))


SEGMENTS = 256
LANCZOS_BITS = 40
OFFSET_BITS = 30


def _lanczos_table() -> np.ndarray:
    """Cubics that follow sinc(x) sinc(x / 3) within 2^-37 on each 1/256 of [0, 3].

    int64 [4, 768], in units of 2^-40; the variable runs from -1/2 to 1/2 within a segment.
    """
    u = np.cos(np.pi * (np.arange(16) + 0.5) / 16) / 2
    x = (np.arange(3 * SEGMENTS)[:, None] + 0.5 + u) / SEGMENTS
    powers = np.vander(u, 4, increasing=True)
    coefficients = np.linalg.lstsq(powers, (np.sinc(x) * np.sinc(x / 3)).T, rcond=None)[0]
    return np.round(coefficients * 2.0**LANCZOS_BITS).astype(np.int64)


def _lanczos(op: OpBuilder, n: ir.Value, d: ir.Value, size_out: ir.Value) -> ir.Value:
    """lanczos_filter times 2^40."""
    scaled = op.Mul(n, SEGMENTS)
    segment = op.Div(scaled, d)
    rest = op.Sub(scaled, op.Mul(segment, d))
    offset = op.Div(op.Mul(op.Sub(op.Mul(rest, 2), d), 1 << (OFFSET_BITS - 1)), d)
    c0, c1, c2, c3 = (
        op.Gather(op.Constant(value=ir.tensor(row)), segment) for row in _lanczos_table()
    )
    value = c3
    for c in (c2, c1, c0):
        value = op.Add(op.Div(op.Mul(value, offset), 1 << OFFSET_BITS), c)
    # The sum is about 2^40 (d / 2 O).
    return op.Div(value, op.Add(op.Div(d, op.Mul(size_out, 1 << 11)), 1))


def _normalise(op: OpBuilder, weights: ir.Value) -> ir.Value:
    """Weights by their sum, as multiples of 2^-22 (normalize_coeffs_8bpc): i64 [G, b, K].

    Long division in two steps of 11 bits, rounding halves away from zero as Pillow does.
    """
    total = op.ReduceSum(weights, [2], keepdims=1)
    scaled = op.Mul(op.Abs(weights), 1 << 11)
    high = op.Div(scaled, total)
    rest = op.Sub(scaled, op.Mul(high, total))
    low = op.Div(op.Add(op.Mul(rest, 1 << 12), total), op.Mul(total, 2))
    value = op.Add(op.Mul(high, 1 << 11), low)
    return op.Where(op.Less(weights, 0), op.Neg(value), value)


def _digits(op: OpBuilder, coefficients: ir.Value) -> ir.Value:
    """q = 256 high + low, with low in [-128, 128): f32 [G, 2b, K], high over low / 256."""
    offset = 1 << 26  # makes the dividend positive
    high = op.Sub(op.Div(op.Add(coefficients, offset + DIGIT // 2), DIGIT), offset // DIGIT)
    low = op.Sub(coefficients, op.Mul(high, DIGIT))
    low = op.Mul(op.Cast(low, to=ir.DataType.FLOAT), 1 / DIGIT)
    return op.Concat(op.Cast(high, to=ir.DataType.FLOAT), low, axis=1)


# Subgraphs.


@contextmanager
def _scope(op: OpBuilder, name: str) -> Iterator[None]:
    """Prefix the names of what is written within."""
    op.builder.push_module(name)
    try:
        yield
    finally:
        op.builder.pop_module()


def _unique_name(op: OpBuilder) -> str:
    """A name no other call in this graph or in those around it has: the place in each of them."""
    builder, place = op.builder, []
    while builder is not None:
        place.append(str(builder.graph.num_nodes()))
        builder = builder.parent
    return "resize" + "_".join(reversed(place))


def _if(
    op: OpBuilder,
    condition: ir.Value,
    then_branch: Callable[[OpBuilder], ir.Value],
    else_branch: Callable[[OpBuilder], ir.Value],
) -> ir.Value:
    """One of two uint8 images [R, C]."""

    def subgraph(write: Callable[[OpBuilder], ir.Value]) -> ir.Graph:
        def trace(op: OpBuilder) -> ir.Value:
            with _scope(op, write.__name__):
                return write(op)

        return op.builder.subgraph(trace, [], [_image()], name=write.__name__)

    result = op.If(condition, then_branch=subgraph(then_branch), else_branch=subgraph(else_branch))
    result.type, result.shape = _image().type, _image().shape
    return result


def _image() -> ir.Value:
    return ir.Value(type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([None, None]))


def _loop(
    op: OpBuilder,
    steps: ir.Value,
    body: Callable[[OpBuilder, ir.Value, ir.Value], list[ir.Value]],
    dtype: ir.DataType,
) -> ir.Value:
    """The matrices that `body` yields, stacked: [steps, ..., ...]."""

    def trace(op: OpBuilder, step: ir.Value, condition: ir.Value) -> list[ir.Value]:
        with _scope(op, "body"):
            return body(op, step, condition)

    def scalar(name: str | None, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))

    inputs = [
        scalar("resize_step", ir.DataType.INT64),
        scalar("resize_condition", ir.DataType.BOOL),
    ]
    outputs = [
        scalar(None, ir.DataType.BOOL),
        ir.Value(type=ir.TensorType(dtype), shape=ir.Shape([None, None])),
    ]
    result = op.Loop(steps, None, body=op.builder.subgraph(trace, inputs, outputs, name="body"))
    result.type, result.shape = ir.TensorType(dtype), ir.Shape([None, None, None])
    return result
