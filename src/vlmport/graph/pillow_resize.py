"""Image.resize of Pillow 13 as a sub-graph: bilinear and bicubic bit for bit, Lanczos all but.

Vision-language models are trained on pixels that Pillow resized, and other resizers differ by
several grey levels. Pillow's own arithmetic is of integers and needs no float64, so it can be
written in ONNX: two passes, each a weighted sum along one axis, rounded to uint8 in between.

Source of the maths: Pillow 13.0, src/libImaging/Resample.c: `ImagingResample` (the order of the
passes), `ImagingResampleHorizontal_8bpc` and `ImagingResampleVertical_8bpc`. The coefficients are
in pillow_coefficients.py, with the legend G, b, K; C is the length of a row, width times three.

A pass goes through the outputs in blocks: it cuts the block's window out of the uint8 image, and
only that is ever float32. A dense product with one matrix would cost a hundred times as much.

Traps:
    - Pillow 13 changed the order of the passes, and so results: the image between is rounded.
    - A name inside a subgraph must differ from all names outside it, hence `scope`.
    - ONNX Runtime 1.31 crashes, or fails to infer types, when it finds a condition constant and
      puts the branch in the place of an If that holds a Loop. Sizes known at export make
      conditions constant, hence `_always`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from vlmport.graph.branches import if_else, scope, unique_name
from vlmport.graph.builder import OpBuilder
from vlmport.graph.pillow_coefficients import Axis, Resample, pillow_axis

__all__ = ["PILLOW_VERSION", "Resample", "resize"]

PILLOW_VERSION = "13"  # the major version whose pixels the graph equals

UINT8 = ir.DataType.UINT8
ROWS, COLUMNS = 0, 1  # the axis of an image [H, C] along which a pass goes
CHANNELS = 3
BLOCK = {ROWS: 12, COLUMNS: 5}
MAX_TAPS = 512  # that many digits make an exact float32 sum: 512 * 128 * 255 < 2^24


def resize(
    op: OpBuilder,
    image: ir.Value,
    height: ir.Value | int,
    width: ir.Value | int,
    resample: Resample,
) -> ir.Value:
    """Resize as `PIL.Image.resize((width, height), resample)` does with an RGB image.

    Args:
        op: the dispatcher to write with.
        image: uint8 [H, W, 3], neither side 0.
        height, width: the new size, int64 scalars or Python integers, at least 1.
        resample: the filter.

    Returns:
        uint8 [height, width, 3].
    """
    resample = Resample(resample)
    with scope(op, unique_name(op, "resize")):
        size = op.Shape(image, end=2)
        new_height, new_width = op.Reshape(height, [1]), op.Reshape(width, [1])
        rows = pillow_axis(op, op.Slice(size, [0], [1]), new_height, resample, BLOCK[ROWS])
        columns = pillow_axis(op, op.Slice(size, [1], [2]), new_width, resample, BLOCK[COLUMNS])
        flat = op.Reshape(image, [0, -1])  # [H, C]
        always = _always(op, flat)

        def vertical_first(op: OpBuilder) -> ir.Value:
            between = _pass(op, flat, rows, ROWS, always)
            return _pass(op, between, columns, COLUMNS, always)

        def horizontal_first(op: OpBuilder) -> ir.Value:
            between = _pass(op, flat, columns, COLUMNS, always)
            return _pass(op, between, rows, ROWS, always)

        condition = op.And(_is_vertical_first(op, rows, columns), always)
        resized = if_else(op, condition, vertical_first, horizontal_first, UINT8, 2)
        return op.Reshape(resized, op.Concat(new_height, new_width, [CHANNELS], axis=0))


def _is_vertical_first(op: OpBuilder, rows: Axis, columns: Axis) -> ir.Value:
    """The order of the passes, as `ImagingResample` chooses it since Pillow 13.0."""
    lost_rows = op.Sub(rows.size_in, rows.size_out)
    lost_columns = op.Sub(columns.size_in, columns.size_out)
    return op.And(op.Greater(lost_rows, 0), op.Greater(lost_rows, op.Mul(lost_columns, 2)))


def _always(op: OpBuilder, image: ir.Value) -> ir.Value:
    """True, so that no optimizer sees it: the first byte of the image is not negative."""
    byte = op.Reshape(op.Slice(image, [0, 0], [1, 1]), [1])
    return op.GreaterOrEqual(op.Cast(byte, to=ir.DataType.INT32), 0)


def _pass(op: OpBuilder, image: ir.Value, axis: Axis, along: int, always: ir.Value) -> ir.Value:
    """Resize one axis of a uint8 image [R, C]; an axis that keeps its size is left alone."""

    def unchanged(op: OpBuilder) -> ir.Value:
        return op.Identity(image)

    def changed(op: OpBuilder) -> ir.Value:
        are_many = op.And(op.Greater(axis.taps, MAX_TAPS), always)
        return if_else(op, are_many, many_taps, few_taps, UINT8, 2)

    def few_taps(op: OpBuilder) -> ir.Value:
        return _few_taps(op, image, axis, along)

    def many_taps(op: OpBuilder) -> ir.Value:
        return _many_taps(op, image, axis, along)

    with scope(op, "rows" if along == ROWS else "columns"):
        is_unchanged = op.And(op.Equal(axis.size_in, axis.size_out), always)
        return if_else(op, is_unchanged, unchanged, changed, UINT8, 2)


def _few_taps(op: OpBuilder, image: ir.Value, axis: Axis, along: int) -> ir.Value:
    """Write the pass, one block of outputs after the other."""
    matrices = _matrices(op, axis, along)

    def body(op: OpBuilder, block: ir.Value) -> list[ir.Value]:
        matrix = op.Gather(matrices, block, axis=0)
        start = op.Gather(axis.start, op.Reshape(block, [1]), axis=0)
        high, low = _window_sums(op, image, matrix, start, axis.window, along)
        return [_to_uint8(op, op.Add(high, op.Floor(low)))]

    (blocks,) = _loop(op, op.Size(axis.start), body, [ir.DataType.UINT8])
    return _join_blocks(op, blocks, axis, along)


def _many_taps(op: OpBuilder, image: ir.Value, axis: Axis, along: int) -> ir.Value:
    """Write the pass for an image that shrinks so far that one sum per output would be inexact.

    Each window is cut into pieces of `MAX_TAPS` inputs, whose sums are exact, and few. The low
    digits' carry is taken out of each sum before they are added up.
    """
    matrices = _matrices(op, axis, along)
    pieces = op.Div(op.Add(axis.window, MAX_TAPS - 1), MAX_TAPS)
    per_tap, taps_axis = (1, 2) if along == ROWS else (CHANNELS, 1)

    def body(op: OpBuilder, step: ir.Value) -> list[ir.Value]:
        step = op.Reshape(step, [1])
        block = op.Div(step, pieces)
        skip = op.Mul(op.Mod(step, pieces), MAX_TAPS)
        end = op.Min(op.Add(skip, MAX_TAPS), axis.window)
        matrix = op.Squeeze(op.Gather(matrices, block, axis=0), [0])
        matrix = op.Slice(matrix, op.Mul(skip, per_tap), op.Mul(end, per_tap), [taps_axis])
        start = op.Add(op.Gather(axis.start, block, axis=0), skip)
        high, low = _window_sums(op, image, matrix, start, op.Sub(end, skip), along)
        carry = op.Floor(low)
        return [op.Add(high, carry), op.Sub(low, carry)]

    steps = op.Mul(op.Size(axis.start), pieces)
    high, low = _loop(op, steps, body, [ir.DataType.FLOAT, ir.DataType.FLOAT])
    shape = op.Concat([-1], pieces, op.Shape(high, start=1), axis=0)  # [G, pieces, ...]
    high = op.ReduceSum(op.Reshape(high, shape), [1], keepdims=0)
    low = op.ReduceSum(op.Reshape(low, shape), [1], keepdims=0)
    return _join_blocks(op, _to_uint8(op, op.Add(high, op.Floor(low))), axis, along)


def _window_sums(
    op: OpBuilder,
    image: ir.Value,
    matrix: ir.Value,
    start: ir.Value,
    length: ir.Value,
    along: int,
) -> tuple[ir.Value, ir.Value]:
    """The weighted sums of a block by both digits: f32 [b, C], or [R, 3b] for columns."""
    high, low = op.Split(matrix, axis=0, num_outputs=2, _outputs=2)
    high, low = op.Squeeze(high, [0]), op.Squeeze(low, [0])
    if along == ROWS:
        window = op.Slice(image, start, op.Add(start, length), [ROWS])
        window = op.Cast(window, to=ir.DataType.FLOAT)  # [K, C]
        return op.MatMul(high, window), op.MatMul(low, window)
    start, length = op.Mul(start, CHANNELS), op.Mul(length, CHANNELS)
    window = op.Slice(image, start, op.Add(start, length), [COLUMNS])
    window = op.Cast(window, to=ir.DataType.FLOAT)  # [R, 3K]
    return op.MatMul(window, high), op.MatMul(window, low)


def _matrices(op: OpBuilder, axis: Axis, along: int) -> ir.Value:
    """The digits as factors of a MatMul: [G, 2, b, K] for rows, [G, 2, 3K, 3b] for columns.

    Columns hold three channels side by side, so each digit becomes a diagonal of three: two
    thirds are zeros, but that costs less than to take the channels apart and together again.
    """
    if along == ROWS:
        return axis.digits
    block = BLOCK[COLUMNS]
    spread = np.einsum("jk,cd->jckd", np.eye(block), np.eye(CHANNELS))  # [b, 3, b, 3]
    spread = spread.reshape(block, -1).astype(np.float32)
    columns = op.Transpose(axis.digits, perm=[0, 1, 3, 2])  # [G, 2, K, b]
    columns = op.MatMul(columns, op.Constant(value=ir.tensor(spread)))  # [G, 2, K, 3 * 3b]
    return op.Reshape(columns, [0, 2, -1, CHANNELS * block])


def _to_uint8(op: OpBuilder, sums: ir.Value) -> ir.Value:
    """Pillow's clip8, floor(sum / 2^22 + 1/2) as a byte, of integers in units of 2^8.

    QuantizeLinear divides, rounds and saturates in one go. It rounds halves to even and Pillow
    rounds them up, so the divisor is one part in 2^23 short of 2^14: that lifts every half by a
    unit in the last place, and the next lower sum, 2^-14 below the half, by 2^-15 at most.
    """
    divisor = 2**14 - 2**-9
    return op.QuantizeLinear(sums, divisor, op.Constant(value=ir.tensor(np.uint8(0))))


def _join_blocks(op: OpBuilder, blocks: ir.Value, axis: Axis, along: int) -> ir.Value:
    """[G, b, C] to [O, C], or [G, R, 3b] to [R, 3 O]; the last block may be too long."""
    if along == ROWS:
        joined = op.Reshape(blocks, op.Concat([-1], op.Shape(blocks, start=2), axis=0))
        return op.Slice(joined, [0], axis.size_out, [ROWS])
    joined = op.Reshape(op.Transpose(blocks, perm=[1, 0, 2]), [0, -1])
    return op.Slice(joined, [0], op.Mul(axis.size_out, CHANNELS), [COLUMNS])


def _loop(
    op: OpBuilder,
    steps: ir.Value,
    body: Callable[[OpBuilder, ir.Value], list[ir.Value]],
    dtypes: Sequence[ir.DataType],
) -> Sequence[ir.Value]:
    """Run `body` with 0, 1, ... and stack each of the matrices that it yields: [steps, ., .]."""

    def trace(op: OpBuilder, step: ir.Value, condition: ir.Value) -> list[ir.Value]:
        with scope(op, "body"):
            return [op.Identity(condition), *body(op, step)]

    flag, index = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.INT64)
    inputs = [
        ir.Value(name="resize_step", type=index, shape=ir.Shape([])),
        ir.Value(name="resize_condition", type=flag, shape=ir.Shape([])),
    ]
    outputs = [ir.Value(type=flag, shape=ir.Shape([]))]
    outputs += [ir.Value(type=ir.TensorType(t), shape=ir.Shape([None, None])) for t in dtypes]
    graph = op.builder.subgraph(trace, inputs, outputs, name="body")
    results = op.Loop(steps, None, body=graph, _outputs=len(dtypes))
    results = [results] if isinstance(results, ir.Value) else results
    for result, dtype in zip(results, dtypes, strict=True):
        result.type, result.shape = ir.TensorType(dtype), ir.Shape([None, None, None])
    return results
