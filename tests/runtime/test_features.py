"""The cache of image features: what is the same image, what is kept, and what has to go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from vlmport.errors import OptionError
from vlmport.runtime.graphs.image_processor import ProcessedImage
from vlmport.runtime.images.features import FeatureCache, content_hash

ROWS, HIDDEN = 4, 8
BYTES = ROWS * HIDDEN * 4 + ROWS * 8 + 3 * 8  # of one encoded image: features, ids, grid


class Counting:
    """Stands for the graphs, and notes what they are asked."""

    position_inputs = ("grid",)

    def __init__(self) -> None:
        self.processed: list[dict[str, Any]] = []
        self.encoded = 0

    def process_image(self, rgb: np.ndarray, options: Mapping[str, Any]) -> ProcessedImage:
        self.processed.append(dict(options))
        ids = np.arange(ROWS)
        inputs = {"pixel_values": rgb.astype("f4"), "grid": np.array([1, *rgb.shape[:2]])}
        return ProcessedImage(inputs, ids)

    def encode_image(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.encoded += 1
        return np.full((ROWS, HIDDEN), inputs["pixel_values"].mean(), "f4")


def new_cache(**settings: Any) -> tuple[FeatureCache, Counting]:
    graphs = Counting()
    return FeatureCache(graphs, **settings), graphs  # pyright: ignore[reportArgumentType]


def image(value: int, height: int = 2, width: int = 3) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def see(cache: FeatureCache, value: int, **options: Any) -> np.ndarray:
    return cache.encoded(cache.process(image(value), options)).rows


def test_the_same_pixels_are_encoded_once() -> None:
    cache, graphs = new_cache()
    for value in (1, 2, 1, 1, 2):
        assert (see(cache, value) == value).all()
    assert (graphs.encoded, len(graphs.processed)) == (2, 2)
    assert (cache.misses, cache.hits) == (2, 3)


def test_an_image_is_processed_before_anything_is_encoded() -> None:
    """A prompt is refused by the number of its tokens, which the processor knows."""
    cache, graphs = new_cache()
    picture = cache.process(image(7))
    assert picture.features is None
    assert picture.prompt_ids.tolist() == [*range(ROWS)]
    assert (graphs.encoded, cache.misses, cache.nbytes) == (0, 0, 0)
    with pytest.raises(AssertionError):
        _ = picture.rows


def test_of_the_inputs_only_those_of_positions_are_kept() -> None:
    cache, _ = new_cache()
    picture = cache.encoded(cache.process(image(7)))
    assert set(picture.inputs) == {"grid"}
    assert cache.nbytes == picture.nbytes == BYTES


def test_an_image_under_other_options_is_another() -> None:
    cache, graphs = new_cache()
    see(cache, 1, max_pixels=100, do_pad=True)
    see(cache, 1, max_pixels=200, do_pad=True)
    see(cache, 1, do_pad=True, max_pixels=100)  # the first again
    assert graphs.processed == [
        {"max_pixels": 100, "do_pad": True},
        {"max_pixels": 200, "do_pad": True},
    ]


def test_an_image_that_was_encoded_stays_so() -> None:
    """Whoever holds it needs it, also when the cache has let it go."""
    cache, graphs = new_cache()
    picture = cache.encoded(cache.process(image(1)))
    cache.clear()
    assert cache.nbytes == 0
    assert cache.encoded(picture) is picture
    assert (graphs.encoded, cache.hits) == (1, 1)
    assert cache.nbytes == BYTES  # and it is here again


def test_two_that_were_processed_before_either_was_encoded() -> None:
    cache, graphs = new_cache()
    first, second = cache.process(image(1)), cache.process(image(1))
    assert cache.encoded(first).rows is cache.encoded(second).rows
    assert graphs.encoded == 1


def test_the_least_recently_used_goes_first() -> None:
    cache, graphs = new_cache(max_bytes=2 * BYTES)
    see(cache, 1)
    see(cache, 2)
    see(cache, 1)  # used again: 2 is the older one
    see(cache, 3)
    assert (graphs.encoded, cache.nbytes) == (3, 2 * BYTES)
    see(cache, 1)
    see(cache, 3)
    assert graphs.encoded == 3
    see(cache, 2)
    assert graphs.encoded == 4


@pytest.mark.parametrize("max_bytes", [0, BYTES - 1])
def test_an_image_larger_than_the_limit_is_not_kept(max_bytes: int) -> None:
    cache, graphs = new_cache(max_bytes=max_bytes)
    for _ in range(2):
        assert (see(cache, 5) == 5).all()
    assert (graphs.encoded, cache.nbytes) == (2, 0)


def test_one_that_is_too_large_drives_out_no_other() -> None:
    cache, graphs = new_cache(max_bytes=BYTES)
    see(cache, 1)
    cache.max_bytes = BYTES - 1
    see(cache, 2)
    cache.max_bytes = BYTES
    see(cache, 1)
    assert graphs.encoded == 2


@pytest.mark.parametrize("max_bytes", [-1, 1.5, True, "64 MB", None])
def test_a_limit_that_is_no_number_of_bytes(max_bytes: Any) -> None:
    with raises(OptionError, "option.wrong-value", f"image_cache_bytes={max_bytes!r}"):
        new_cache(max_bytes=max_bytes)


def test_the_hash_is_of_pixels_shape_and_options() -> None:
    pixels = np.arange(36, dtype=np.uint8)
    wide, tall = pixels.reshape(3, 4, 3), pixels.reshape(4, 3, 3)
    changed = wide.copy()
    changed[-1, -1, -1] ^= 1
    different = [
        content_hash(wide),
        content_hash(tall),
        content_hash(changed),
        content_hash(wide, {"size": 1}),
        content_hash(wide, {"size": 2}),
        content_hash(wide, {"other": 1}),
    ]
    assert len(set(different)) == len(different)
    mirrored = np.ascontiguousarray(wide[:, ::-1])[:, ::-1]  # the same pixels, read backwards
    assert content_hash(mirrored) == content_hash(wide, {}) == content_hash(wide, None)
    assert content_hash(wide, {"a": 1, "b": 2}) == content_hash(wide, {"b": 2, "a": 1})
