"""The sides of pictures, against transformers' own function in Python's doubles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tests.graph.running import open_graph
from vlmport.families.qwen_vl.smart_resize import MOST_LEAST, SmartResize
from vlmport.graph.builder import add_output, new_graph

INT64 = ir.DataType.INT64
NAMES = ("height", "width", "least", "most")
FACTORS = [28, 32, 14, 1]
UNBOUNDED = 1 << 40


@cache
def session(factor: int, *, checked: bool) -> ort.InferenceSession:
    builder = new_graph("smart_resize")
    dim = 1 if checked else "n"
    inputs = [builder.input(name, INT64, [dim]) for name in NAMES]
    resize = SmartResize(factor)
    write = resize.sides if checked else resize.whole_blocks
    for name, value in zip(NAMES, write(builder.op, *inputs), strict=False):
        add_output(builder, value, f"new_{name}", INT64, [dim])
    return open_graph(builder, {})


def assert_equal(factor: int, *columns: np.ndarray | int) -> np.ndarray:
    """Compare one size after the other, of those that transformers takes. Returns what differs from
    the sides without any rounding of doubles."""
    height, width, least, most = np.broadcast_arrays(*columns)
    taken = (np.maximum(height, width) <= 200 * np.minimum(height, width)) & (least <= most)
    rows = np.stack([height, width, least, most], axis=1)[taken & (height * width < 10**8)]
    assert len(rows) > 1000
    got = session(factor, checked=False).run(None, dict(zip(NAMES, rows.T.copy(), strict=True)))
    want = [smart_resize(h, w, factor, least, most) for h, w, least, most in rows.tolist()]
    np.testing.assert_array_equal(np.stack(got, axis=1), want)
    plain = [SmartResize(factor).sides_of(*row) for row in rows.tolist()]
    assert plain == want
    return np.array(
        [exact(factor, *row) != new for row, new in zip(rows.tolist(), want, strict=True)]
    )


def exact(factor: int, height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """The same in whole numbers."""
    sides = ((height, width), (width, height))
    new = [round(side / factor) for side, _ in sides]
    if math.prod(new) * factor**2 > most:
        new = [max(1, math.isqrt(a * most // (b * factor**2))) for a, b in sides]
    elif math.prod(new) * factor**2 < least:
        new = [math.isqrt((a * least - 1) // (b * factor**2)) + 1 for a, b in sides]
    return new[0] * factor, new[1] * factor


@pytest.mark.parametrize("factor", FACTORS)
def test_any_sides(factor: int) -> None:
    random = np.random.default_rng(factor)
    height = random.integers(1, 3000, 8_000)
    width = np.maximum(height * np.exp(random.normal(size=8_000)), 1).astype(np.int64)
    assert_equal(factor, height, width, 56 * 56, 28 * 28 * 1280)
    assert_equal(factor, height, width, 64 * 32 * 32, 1 << 24)


@pytest.mark.parametrize("factor", FACTORS)
def test_sides_on_a_boundary_where_doubles_fall_over_it(factor: int) -> None:
    """k² f² w = h limit: without rounding the new height is k f."""
    random = np.random.default_rng(factor)
    width, times, k = (random.integers(1, most, 20_000) for most in (4000, 30, 50))
    height, blocks = width * times, (k * factor) ** 2
    limit = blocks[blocks % times == 0] // times[blocks % times == 0]
    height, width = height[blocks % times == 0], width[blocks % times == 0]
    fallen = [
        assert_equal(factor, *sides, *limits).sum()
        for sides in ((height, width), (width, height))
        for limits in ((limit, UNBOUNDED), (1, limit))
    ]
    assert min(fallen) > 0 or factor == 1


def test_large_sides_and_limits() -> None:
    random = np.random.default_rng(0)
    width = random.integers(400, 1500, 4_000)
    # At 200 times the other, no side of a picture of 100 million pixels is longer.
    height = np.minimum(width * random.integers(1, 200, 4_000), 141_421)
    for limit in (1, 28 * 28, 1 << 20, 1 << 24, MOST_LEAST):
        assert_equal(28, height, width, np.minimum(limit, 3136), limit)
        assert_equal(28, height, width, limit, UNBOUNDED)


def test_sides_that_are_known() -> None:
    known = {
        (28, 686, 960, 3136, 12845056): (672, 952),  # 24.5 is 24, a half to even: 816 tokens
        (28, 19, 19, 3136, 1003520): (84, 84),  # 56 without rounding of doubles
        (28, 28, 28, 784, 12845056): (28, 28),
        (28, 1, 1, 1, 12845056): (28, 28),
        (32, 686, 960, 65536, 16777216): (672, 960),
        (28, 60, 1300, 3136, 1003520): (56, 1288),
        (28, 427, 40, 3136, 1003520): (420, 28),
    }
    for (factor, *sides), new in known.items():
        feeds = {name: np.array([side]) for name, side in zip(NAMES, sides, strict=True)}
        got = session(factor, checked=True).run(None, feeds)
        assert tuple(int(side.item()) for side in got) == new


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ((1, 201, 1, 4096), "one side is more than 200 times the other"),
        ((20_100, 100, 1, 4096), "one side is more than 200 times the other"),
        ((100, 100, 4097, 4096), "min_pixels is more than max_pixels"),
        ((100, 100, 0, 4096), "min_pixels is less than 1"),
        ((100, 100, -5, -4), "min_pixels is less than 1"),
        ((100, 100, MOST_LEAST + 1, 1 << 30), f"min_pixels is more than {MOST_LEAST}"),
        ((1, 200, MOST_LEAST, 1 << 30), "a side would become more than 65536 pixels"),
    ],
)
def test_what_is_refused(sides: tuple[int, ...], reason: str) -> None:
    feeds = {name: np.array([side]) for name, side in zip(NAMES, sides, strict=True)}
    with pytest.raises(Exception, match=f"Name:'refused: {reason}"):
        session(28, checked=True).run(None, feeds)


def test_200_times_is_taken() -> None:
    run: Callable[..., list[np.ndarray]] = session(28, checked=True).run
    feeds = {name: np.array([side]) for name, side in zip(NAMES, (3, 600, 1, 4096), strict=True)}
    new = tuple(int(side.item()) for side in run(None, feeds))
    assert new == smart_resize(3, 600, 28, 1, 4096)
