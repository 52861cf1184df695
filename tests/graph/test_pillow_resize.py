"""The resize sub-graph equals the installed Pillow, value for value."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmport.errors import ConfigError
from vlmport.graph import pillow_resize
from vlmport.graph.builder import add_output, new_graph, to_model
from vlmport.graph.pillow_coefficients import DIGIT, MAX_SIDE, pillow_axis
from vlmport.graph.pillow_resize import PILLOW_VERSION, Resample, resize
from vlmport.runtime.images import reading

FILTERS = list(Resample)


def test_the_installed_pillow_is_the_one_that_the_graph_equals():
    assert PIL.__version__.split(".")[0] == PILLOW_VERSION, (
        f"Pillow {PIL.__version__} is installed and the graph equals Pillow {PILLOW_VERSION}: "
        "read ImagingResample in its Resample.c again, then raise PILLOW_VERSION"
    )


def resize_model(resample: Resample) -> onnx.ModelProto:
    builder = new_graph("resize")
    image = builder.input("image", ir.DataType.UINT8, ["height", "width", 3])
    size = [builder.input(name, ir.DataType.INT64, []) for name in ("rows", "columns")]
    resized = resize(builder.op, image, *size, resample)
    add_output(builder, resized, "resized", ir.DataType.UINT8, ["new_height", "new_width", 3])
    proto = ir.to_proto(to_model(builder))
    onnx.checker.check_model(proto, full_check=True)
    return proto


@cache
def session(resample: Resample) -> ort.InferenceSession:
    return open_session(resize_model(resample))


def open_session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(image: np.ndarray, height: int, width: int, resample: Resample) -> np.ndarray:
    feeds = {"image": image, "rows": np.array(height), "columns": np.array(width)}
    return np.asarray(session(resample).run(None, feeds)[0])


def pillow(image: np.ndarray, height: int, width: int, resample: Resample) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), int(resample)))


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft shapes, grain, and areas of 0 and 255, where a filter overshoots."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3)).astype(np.uint8)
    soft = pillow(coarse, height, width, Resample.BICUBIC).astype(np.int16)
    grain = rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
    return np.clip((soft - 128) * 3 // 2 + 128 + grain, 0, 255).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Every value at random: the hardest picture for sums that have to be exact."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_equal_to_pillow(image: np.ndarray, height: int, width: int, resample: Resample) -> None:
    """Equal; with Lanczos, whose sine is not Pillow's, one value in a million may be off by one."""
    expected, actual = pillow(image, height, width, resample), run(image, height, width, resample)
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape == (height, width, 3)
    difference = np.abs(actual.astype(np.int16) - expected)
    differing = np.count_nonzero(difference)
    sizes = f"{image.shape[:2]} to {(height, width)}"
    if resample is Resample.LANCZOS:
        allowed = 1 + difference.size // 1_000_000
        assert difference.max() <= 1, f"{sizes}: off by {difference.max()}"
        assert differing <= allowed, f"{sizes}: {differing} values differ"
    else:
        assert differing == 0, f"{sizes}: {differing} values differ, by up to {difference.max()}"


# Sizes.

AWKWARD = [
    ((1, 1), (28, 28)),
    ((1, 4000), (4000, 1)),
    ((4000, 1), (1, 4000)),
    ((480, 640), (476, 644)),  # vertical first
    ((2, 3), (512, 512)),
    ((8, 9000), (20, 9001)),
    ((60, 1300), (56, 1288)),
    ((37, 53), (37, 53)),  # nothing to do
    ((37, 53), (37, 20)),  # one pass, each of them
    ((37, 53), (20, 53)),
    ((37, 53), (80, 53)),
    ((768, 1024), (224, 224)),
    ((300, 200), (1024, 512)),
]


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("old", "new"), AWKWARD)
def test_awkward_sizes(old, new, resample):
    assert_equal_to_pillow(photograph(*old), *new, resample)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("new", [(1536, 2048), (224, 224)])
def test_a_photograph_of_twelve_megapixels(new, resample):
    assert_equal_to_pillow(photograph(3000, 4000), *new, resample)


# Shrinking by more than 512 taps: the bound of one exact float32 sum.
FAR = [
    ((3000, 400), (4, 3)),
    ((400, 3000), (3, 4)),
    ((4, 16384), (2, 1)),
    ((16384, 4), (1, 2)),
    ((3, 30000), (2, 7)),
    ((30000, 3), (40, 2)),
    ((2, MAX_SIDE), (2, 30)),
]


@pytest.mark.parametrize(
    "make", [photograph, noise, lambda h, w: np.full((h, w, 3), 255, np.uint8)]
)
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("old", "new"), FAR)
def test_shrinking_beyond_one_exact_sum(old, new, resample, make):
    assert_equal_to_pillow(make(*old), *new, resample)


def test_runtimes_refuse_what_is_longer():
    assert reading.MAX_SIDE == MAX_SIDE


def test_the_longest_sum_of_low_digits_is_an_exact_float32():
    assert pillow_resize.MAX_TAPS * 255 * (DIGIT // 2) < 1 << 24


@pytest.mark.parametrize("resample", FILTERS)
def test_shrinking_at_the_border_between_the_two_sums(resample):
    border = pillow_resize.MAX_TAPS // (2 * resample.support)  # inputs per output
    for ratio in (border - 2, border - 1, border, border + 1):
        assert_equal_to_pillow(noise(4, 3 * ratio), 4, 3, resample)
        assert_equal_to_pillow(noise(3 * ratio, 4), 3, 4, resample)


side = st.integers(1, 400) | st.sampled_from([1, 2, 3, 14, 224, 256, 378, 384, 512, 1000])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(side, side, side, side, st.sampled_from(FILTERS), st.integers(0, 5))
def test_any_size(height, width, new_height, new_width, resample, seed):
    make = noise if seed % 2 else photograph
    assert_equal_to_pillow(make(height, width, seed), new_height, new_width, resample)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 4000), st.integers(1, 3), st.integers(1, 400), st.sampled_from(FILTERS))
def test_extreme_aspect_ratios(length, width, new_length, resample):
    assert_equal_to_pillow(noise(length, width), new_length, width + 1, resample)
    assert_equal_to_pillow(noise(width, length), width + 1, new_length, resample)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("size", [(50, 70), ("height", "width")])
def test_sizes_known_at_export_and_two_calls_in_one_graph(size, resample):
    """Constant conditions, nested as here, crash the optimizer of ONNX Runtime 1.31."""
    builder = new_graph("twice")
    image = builder.input("image", ir.DataType.UINT8, [*size, 3])
    large = resize(builder.op, image, 96, 80, resample)
    small = resize(builder.op, large, 32, 40, resample)
    add_output(builder, large, "large", ir.DataType.UINT8, [96, 80, 3])
    add_output(builder, small, "small", ir.DataType.UINT8, [32, 40, 3])
    proto = ir.to_proto(to_model(builder))
    onnx.checker.check_model(proto, full_check=True)
    picture = photograph(50, 70)
    actual = open_session(proto).run(None, {"image": picture})
    expected = pillow(picture, 96, 80, resample)
    np.testing.assert_array_equal(actual[0], expected)
    np.testing.assert_array_equal(actual[1], pillow(expected, 32, 40, resample))


def test_the_codes_are_those_of_pil():
    assert {f.name: f.value for f in Resample} == {
        f.name: f.value for f in Image.Resampling if f.name in Resample.__members__
    }


def test_a_filter_that_is_not_written_is_named():
    with pytest.raises(ConfigError) as caught:
        Resample(0)
    assert str(caught.value) == ("resample: expected 1 (lanczos), 2 (bilinear), 3 (bicubic), got 0")


# The comparison can fail.


def test_the_other_order_of_passes_is_seen(monkeypatch):
    """480x640 to 476x644 is where Pillow 13 and 12 differ: by up to three levels."""
    right = pillow_resize._is_vertical_first
    monkeypatch.setattr(
        pillow_resize, "_is_vertical_first", lambda op, *axes: op.Not(right(op, *axes))
    )
    flipped = open_session(resize_model(Resample.BICUBIC))
    image = photograph(480, 640)
    feeds = {"image": image, "rows": np.array(476), "columns": np.array(644)}
    difference = flipped.run(None, feeds)[0] != pillow(image, 476, 644, Resample.BICUBIC)
    assert difference.mean() > 0.01


def test_a_neighbouring_filter_is_seen():
    image = photograph(60, 80)
    with pytest.raises(AssertionError, match="values differ"):
        np.testing.assert_array_equal(
            run(image, 40, 50, Resample.BICUBIC),
            pillow(image, 40, 50, Resample.BILINEAR),
            err_msg="values differ",
        )


# The coefficients, apart from the pixels.


def pillow_coefficients(size_in: int, size_out: int, resample: Resample) -> np.ndarray:
    """precompute_coeffs and normalize_coeffs_8bpc in double precision: int64 [O, I]."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5)[:, None] * scale
    x = np.abs((np.arange(size_in) - centre + 0.5) * (1.0 / stretch))
    if resample is Resample.BILINEAR:
        weights = 1 - x
    elif resample is Resample.BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1
        weights = np.where(x < 1, near, (((x - 5) * x + 8) * x - 4) * -0.5)
    else:
        weights = np.sinc(x) * np.sinc(x / 3)
    weights = np.where(x < resample.support, weights, 0)
    weights = weights / weights.sum(axis=1, keepdims=True) * (1 << 22)
    return np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)


@cache
def coefficient_session(resample: Resample) -> ort.InferenceSession:
    builder = new_graph("axis")
    sizes = [builder.input(name, ir.DataType.INT64, [1]) for name in ("size_in", "size_out")]
    axis = pillow_axis(builder.op, *sizes, resample, block=4)
    add_output(builder, axis.digits, "digits", ir.DataType.FLOAT, ["G", 2, 4, "K"])
    add_output(builder, axis.start, "start", ir.DataType.INT64, ["G"])
    return open_session(ir.to_proto(to_model(builder)))


def graph_coefficients(size_in: int, size_out: int, resample: Resample) -> np.ndarray:
    """What the graph computes, out of its blocks: int64 [O, I]."""
    feeds = {"size_in": np.array([size_in]), "size_out": np.array([size_out])}
    digits, start = coefficient_session(resample).run(None, feeds)
    values = np.rint(256.0 * digits.astype(np.float64).sum(axis=1)).astype(np.int64)  # [G, b, K]
    dense = np.zeros((size_out, size_in), np.int64)
    for output in range(size_out):
        row, first = values[output // 4, output % 4], start[output // 4]
        dense[output, first : first + len(row)] = row
    return dense


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [
        (4000, 2048),
        (3000, 224),
        (640, 644),
        (7, 512),
        (16384, 16),
        (16384, 1),
        (30000, 3),
        (5, 30000),
        (MAX_SIDE, 30),
    ],
)
def test_coefficients_of_large_sizes_do_not_overflow(size_in, size_out, resample):
    """A coefficient may be off by one where the fraction lies on a half within 2^-50."""
    expected = pillow_coefficients(size_in, size_out, resample)
    difference = np.abs(graph_coefficients(size_in, size_out, resample) - expected)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 2


# The graph.


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)


@pytest.mark.parametrize("resample", FILTERS)
def test_no_float64_anywhere(resample):
    """The WebGPU build of ONNX Runtime refuses to open a graph that has any."""
    proto = onnx.shape_inference.infer_shapes(resize_model(resample), strict_mode=True)
    double = onnx.TensorProto.DOUBLE
    typed = 0
    for graph in all_graphs(proto.graph):
        values = [*graph.input, *graph.output, *graph.value_info]
        assert all(value.type.tensor_type.elem_type != double for value in values)
        assert all(tensor.data_type != double for tensor in graph.initializer)
        for node in graph.node:
            attributes = {a.name: a for a in node.attribute}
            assert not (node.op_type == "Cast" and attributes["to"].i == double)
            assert not ("value" in attributes and attributes["value"].t.data_type == double)
        typed += len(values)
    assert typed > 300  # inference did tell the types


@pytest.mark.parametrize("resample", FILTERS)
def test_only_standard_operators_and_the_same_bytes_twice(resample):
    proto = resize_model(resample)
    assert all(not node.domain for graph in all_graphs(proto.graph) for node in graph.node)
    assert proto.SerializeToString(deterministic=True) == resize_model(resample).SerializeToString(
        deterministic=True
    )


MEASURE = """
import sys
import numpy as np, onnxruntime as ort
height, width, rows, columns = map(int, sys.argv[2:])
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
def run(image, rows, columns):
    feeds = {"image": image, "rows": np.array(rows), "columns": np.array(columns)}
    return session.run(None, feeds)[0]
run(np.zeros((64, 64, 3), np.uint8), 32, 32)
image = np.ones((height, width, 3), np.uint8)
def peak():  # ru_maxrss would start with that of the parent
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
run(image, rows, columns)
print((peak() - before) / image.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("rows", "columns"), [(224, 224), (1536, 2048), (4, 5)])
def test_memory_is_a_small_multiple_of_the_picture(rows, columns, tmp_path: Path):
    """A picture of 36 MB as float32 alone would be four times its size."""
    path = tmp_path / "resize.onnx"
    onnx.save(resize_model(Resample.LANCZOS), path)
    arguments = [str(path), "3000", "4000", str(rows), str(columns)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 3
