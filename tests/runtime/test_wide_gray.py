"""Gray of more than 8 bits, read as 8: scaled, or stretched where it has no fixed white."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vlmport.runtime.images.reading import open_image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_sixteen_bit_gray_is_scaled_not_clipped():
    values = np.array([[0, 255, 257, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert open_image(data)[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    big_endian = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    assert open_image(big_endian)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.0, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[7, 7, 7]], np.int32), [7, 7, 7]),
        (np.array([[-7, -7, -7]], np.int32), [0, 0, 0]),
    ],
)
def test_wide_gray(values: np.ndarray, want: list[int]):
    assert open_image(Image.fromarray(values))[0, :, 0].tolist() == want


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_gray_is_read_band_by_band(dtype: type[np.generic]):
    """Many rows give what each has alone under the same extremes, and take little memory."""
    values = np.random.default_rng(1).integers(0, 65536, (2100, 1500)).astype(dtype)
    values[0, :2] = 0, 65535
    image = Image.fromarray(values)
    image.load()
    tracemalloc.start()
    whole = open_image(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(whole[..., 0], np.rint(values.astype(np.float64) / 257))
    assert (whole == whole[..., :1]).all()
    assert peak < 12 * values.size  # Pillow's copy, ours, the result of 3 bytes; one band


def test_a_transparent_color_of_16_bits_becomes_white():
    data = encoded(Image.fromarray(np.array([[300, 301, 40_000]], np.uint16)), "PNG")
    plain = open_image(data)[0, :, 0].tolist()
    assert plain == [1, 1, 156]
    declared = encoded(Image.open(io.BytesIO(data)), "PNG", transparency=300)
    assert open_image(declared)[0, :, 0].tolist() == [255, 1, 156]
