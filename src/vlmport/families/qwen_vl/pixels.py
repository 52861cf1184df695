"""Process images as Qwen's processor does: of any size, cut into patches.

Source: transformers 5.23, image_processing_pil_qwen2_vl.py, Qwen2VLImageProcessorPil.

Traps:
- The limits of an image's pixels have three spellings: `min_pixels`, `size.shortest_edge` and, in
  files of transformers 4.49, `size.min_pixels`. The first takes precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import onnx_ir as ir

from vlmport.checkpoint import Size, read_config, subsection
from vlmport.errors import ConfigError
from vlmport.families.qwen_vl.patchify import Patching
from vlmport.families.qwen_vl.smart_resize import SmartResize
from vlmport.graph.builder import GraphBuilder, add_output, new_graph
from vlmport.graph.image import image_input, normalized_planes
from vlmport.graph.pillow_resize import Resample, resize

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
MIN_PIXELS, MAX_PIXELS = "min_pixels", "max_pixels"


@dataclass(frozen=True)
class PixelConfig:
    """The image processor's settings, with the defaults of Qwen2VLImageProcessor."""

    min_pixels: Size
    max_pixels: Size
    patch_size: Size = 14
    temporal_patch_size: Size = 2
    merge_size: Size = 2
    resample: int = 3  # Pillow's code of bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "resample": (1, 2, 3),
    }

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Read the image processor's settings. Raises ConfigError."""
        config = read_config(cls, {**raw, **_limits(raw, where)}, where)
        if config.min_pixels > config.max_pixels:
            raise ConfigError(
                f"{where}: at least {config.min_pixels} pixels (min_pixels, size.shortest_edge), "
                f"at most {config.max_pixels} (max_pixels, size.longest_edge)",
                hint="no image has both; the second must not be less",
                code="config.contradiction",
            )
        return config

    @property
    def patching(self) -> Patching:
        return Patching(self.patch_size, self.temporal_patch_size, self.merge_size)


def _limits(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read min_pixels and max_pixels, in any of their spellings."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    if raw.get("size") is not None:
        size = subsection(raw, "size", where)
    limits = {}
    for name, edge in ((MIN_PIXELS, "shortest_edge"), (MAX_PIXELS, "longest_edge")):
        spellings = (raw.get(name), size.get(edge), size.get(name))
        limits[name] = next((value for value in spellings if value is not None), None)
    return limits


def image_processor_graph(pixels: PixelConfig, image_token_id: int) -> GraphBuilder:
    """image u8[H, W, 3], min_pixels i64[], max_pixels i64[] → pixel_values f32[N, C·T·p·p],
    image_grid_thw i64[1, 3], prompt_ids i64[N / m²]."""
    builder = new_graph("image_processor")
    op, patching = builder.op, pixels.patching
    image = image_input(builder)
    limits = [op.Reshape(builder.input(name, INT64, []), [1]) for name in (MIN_PIXELS, MAX_PIXELS)]
    size = op.Shape(image, end=2)
    sides = (op.Slice(size, [0], [1]), op.Slice(size, [1], [2]))
    height, width = SmartResize(patching.factor).sides(op, *sides, *limits)
    image = resize(op, image, op.Squeeze(height), op.Squeeze(width), Resample(pixels.resample))
    patches = normalized_planes(
        op, patching.cut(op, image), pixels.rescale_factor, pixels.image_mean, pixels.image_std
    )
    rows = patching.rows(op, patches)
    tokens = op.Div(op.Shape(rows, end=1), pixels.merge_size**2)
    prompt_ids = op.Expand(op.Constant(value_ints=[image_token_id]), tokens)
    add_output(builder, rows, "pixel_values", FLOAT, ["num_patches", patching.width])
    add_output(builder, patching.grid(op, image), "image_grid_thw", INT64, [1, 3])
    add_output(builder, prompt_ids, "prompt_ids", INT64, ["num_prompt_ids"])
    return builder
