"""Qwen's pictures: grids and pixels to the bit as transformers' processor on Pillow has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.running import open_graph
from vlmport.errors import ConfigError
from vlmport.families.qwen_vl.pixels import PixelConfig, image_processor_graph

TOKEN = 7
QWEN2_5 = {"patch_size": 14}
QWEN3 = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
LIMITS = {"min_pixels": 4 * 28 * 28, "max_pixels": 100 * 28 * 28}

Outputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@cache
def graph(name: str) -> Callable[[np.ndarray, int, int], Outputs]:
    config = PixelConfig.read({**LIMITS, **KINDS[name]}, name)
    session = open_graph(image_processor_graph(config, TOKEN), {})

    def run(rgb: np.ndarray, least: int, most: int) -> Outputs:
        limits = {"min_pixels": np.array(least), "max_pixels": np.array(most)}
        pixels, grid, ids = session.run(None, {"image": rgb, **limits})
        return np.asarray(pixels), np.asarray(grid), np.asarray(ids)

    return run


KINDS: dict[str, dict[str, Any]] = {
    "qwen2.5": QWEN2_5,
    "qwen3": QWEN3,
    "odd": {"patch_size": 6, "merge_size": 3, "temporal_patch_size": 3, "resample": 2},
}


@cache
def processor(name: str) -> Any:
    return transformers.Qwen2VLImageProcessorPil(**{**LIMITS, **KINDS[name]})


def noise(height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(height * 7919 + width)
    return random.integers(0, 256, (height, width, 3)).astype(np.uint8)


def assert_equal(name: str, height: int, width: int, least: int, most: int) -> None:
    rgb = noise(height, width)
    pixels, grid, ids = graph(name)(rgb, least, most)
    size = {"shortest_edge": least, "longest_edge": most}
    want = processor(name)(rgb, size=size, input_data_format="channels_last", return_tensors="np")
    np.testing.assert_array_equal(grid, want["image_grid_thw"])
    np.testing.assert_array_equal(pixels, want["pixel_values"])
    merge = processor(name).merge_size
    np.testing.assert_array_equal(ids, np.full(grid.prod() // merge**2, TOKEN))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 3), (28, 28), (27, 29), (32, 32), (60, 1300), (427, 40), (480, 640), (13, 2600)],
)
def test_pictures_are_those_of_transformers(name: str, height: int, width: int) -> None:
    assert_equal(name, height, width, *LIMITS.values())


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_the_limits_of_the_hub(name: str) -> None:
    limits = {"qwen2.5": (3136, 12845056), "qwen3": (65536, 16777216)}[name]
    assert_equal(name, 686, 960, *limits)
    pixels, grid, ids = graph(name)(noise(686, 960), *limits)
    assert len(ids) == {"qwen2.5": 816, "qwen3": 630}[name]
    assert grid.tolist() == [{"qwen2.5": [1, 48, 68], "qwen3": [1, 42, 60]}[name]]
    assert len(pixels) == 4 * len(ids)
    assert_equal(name, 19, 19, *limits)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*KINDS]), st.integers(1, 300), st.integers(1, 300), st.data())
def test_any_picture_and_any_limits(
    name: str, height: int, width: int, data: st.DataObject
) -> None:
    width = min(max(width, -(-height // 200)), 200 * height)
    least = data.draw(st.integers(1, 100_000))
    most = data.draw(st.integers(least, 200_000))
    assert_equal(name, height, width, least, most)


@pytest.mark.parametrize(
    ("size", "limits", "reason"),
    [
        ((1, 201), (3136, 4096), "one side is more than 200 times the other"),
        ((50, 50), (4097, 4096), "min_pixels is more than max_pixels"),
        ((50, 50), (0, 4096), "min_pixels is less than 1"),
    ],
)
def test_what_is_refused(size: tuple[int, int], limits: tuple[int, int], reason: str) -> None:
    with pytest.raises(Exception, match=f"refused: {reason}"):
        graph("qwen2.5")(noise(*size), *limits)


def test_what_transformers_refuses_too() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        processor("qwen2.5")(noise(1, 201), input_data_format="channels_last")


# What is read

SPELLINGS: list[dict[str, Any]] = [
    {"min_pixels": 784, "max_pixels": 7840},
    {"size": {"shortest_edge": 784, "longest_edge": 7840}},
    {"min_pixels": 784, "max_pixels": 7840, "size": {"shortest_edge": 5, "longest_edge": 6}},
    {"min_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 1}, "max_pixels": 7840},
    {"min_pixels": 784, "max_pixels": 7840, "size": {"min_pixels": 784, "max_pixels": 7840}},
]


@pytest.mark.parametrize("raw", SPELLINGS, ids=range(len(SPELLINGS)))
def test_the_spellings_of_the_limits(raw: dict[str, Any]) -> None:
    config = PixelConfig.read(raw, "here")
    assert (config.min_pixels, config.max_pixels) == (784, 7840)
    truth = transformers.Qwen2VLImageProcessorPil(**raw).size
    assert (truth["shortest_edge"], truth["longest_edge"]) == (784, 7840)


def test_absent_keys_mean_what_hugging_face_means_by_them() -> None:
    config, truth = PixelConfig.read({}, "here"), transformers.Qwen2VLImageProcessorPil()
    limits = truth.size["shortest_edge"], truth.size["longest_edge"]
    assert (config.min_pixels, config.max_pixels) == limits
    for name in ("patch_size", "temporal_patch_size", "merge_size", "rescale_factor"):
        assert getattr(config, name) == getattr(truth, name)
    assert config.resample == truth.resample
    assert list(config.image_mean) == list(truth.image_mean)
    assert list(config.image_std) == list(truth.image_std)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"min_pixels": 5000, "max_pixels": 4000}, "at least 5000 pixels .* at most 4000"),
        ({"min_pixels": 0}, "min_pixels: expected an int of at least 1, got 0"),
        ({"size": {"height": 5, "width": 5}}, "min_pixels: .* got null"),
        ({"do_resize": False}, r"do_resize=false \(supported: true\)"),
        ({"resample": 0}, "resample=0"),
        ({"patch_size": [14, 14]}, "patch_size: expected an int"),
    ],
)
def test_settings_that_are_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PixelConfig.read(raw, "here")
