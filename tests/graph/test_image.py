"""Rescaling and normalising give the very bits of the PIL-backed processors of transformers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.errors import raises
from vlmport.errors import ConfigError
from vlmport.graph.builder import add_output, new_graph, to_model
from vlmport.graph.image import image_input, rescale_and_normalize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# Every byte value in every channel; 16 by 48, so that a swap of the axes shows.
PIXELS = np.random.default_rng(0).permuted(
    np.repeat(np.arange(768, dtype=np.uint16)[:, None] % 256, 3, axis=1), axis=0
)
PIXELS = PIXELS.astype(np.uint8).reshape(16, 48, 3)


def model(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> onnx.ModelProto:
    builder = new_graph("normalize")
    values = rescale_and_normalize(builder.op, image_input(builder), scale, mean, std)
    add_output(builder, values, "values", ir.DataType.FLOAT, [1, 3, "height", "width"])
    proto = ir.to_proto(to_model(builder))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    session = ort.InferenceSession(
        model(scale, mean, std).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"image": PIXELS})[0])


@pytest.mark.parametrize("processor_class", [SiglipImageProcessorPil, CLIPImageProcessorPil])
@pytest.mark.parametrize(
    ("scale", "mean", "std"),
    [
        (1 / 255, HALF, HALF),
        (1 / 255, CLIP_MEAN, CLIP_STD),
        (1 / 127.5, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (0.0039, CLIP_MEAN, CLIP_STD),  # no divisor fits: looked up
    ],
)
def test_bits_equal_the_reference(processor_class, scale, mean, std):
    processor = processor_class(
        do_resize=False,
        do_center_crop=False,
        rescale_factor=scale,
        image_mean=list(mean),
        image_std=list(std),
    )
    expected = np.stack(processor(PIXELS, return_tensors="np")["pixel_values"])
    actual = run(scale, mean, std)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


def test_every_byte_of_every_channel_is_tried():
    assert all(len(np.unique(PIXELS[:, :, channel])) == 256 for channel in range(3))


def test_the_comparison_can_fail():
    """A fused multiplication, which is what one would write, is not the reference."""
    fused = PIXELS.astype(np.float32) * np.float32(1 / 255)
    fused = (fused - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    assert (run(1 / 255, CLIP_MEAN, CLIP_STD)[0] != fused.transpose(2, 0, 1)).any()


@pytest.mark.parametrize(("scale", "lookup"), [(1 / 255, False), (1 / 256, False), (0.0039, True)])
def test_a_table_is_used_only_where_division_is_inexact(scale, lookup):
    operators = {node.op_type for node in model(scale, HALF, HALF).graph.node}
    assert ("Gather" in operators) == lookup


def test_the_input_is_named_and_has_free_sizes():
    builder = new_graph("input")
    image = image_input(builder)
    assert image.name == "image"
    assert image.dtype == ir.DataType.UINT8
    assert str(image.shape) == "[height,width,3]"


@pytest.mark.parametrize(
    ("scale", "mean", "std"),
    [
        (0.0, HALF, HALF),
        (-1 / 255, HALF, HALF),
        (1e-320, HALF, HALF),
        (1e300, HALF, HALF),
        (1 / 255, (0.5, 1e308, 0.5), HALF),
        (1 / 255, HALF, (0.5, 0.5, 0.0)),
        (1 / 255, HALF, (1e-50, 0.5, 0.5)),
    ],
)
def test_numbers_that_no_pixel_can_have_are_refused(scale, mean, std):
    with raises(ConfigError, "config.wrong-value", "image_mean", "image_std", "NaN") as caught:
        model(scale, mean, std)
    assert caught.value.hint
