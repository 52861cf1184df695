"""Qwen3-VL's vision tower: patches of images of any sizes → features, and DeepStack lanes.

Source: transformers 5.23, modeling_qwen3_vl.py and vision_utils.py.

Traps:
- The learnt positions are a square, interpolated for every grid, its corners at the corners. The
  float32 steps are those of transformers, in their order: another order moves a patch that should
  meet a learnt position exactly to just below it.
- The norm of the last merger comes before patches are put side by side, those of the DeepStack
  mergers after.
- The activation of the mergers is the exact GELU, independent of hidden_act.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import nn

from vlmport.checkpoint import Layers, Size
from vlmport.errors import ConfigError
from vlmport.families.qwen_vl.frame_attention import FrameAttention
from vlmport.families.qwen_vl.tower import (
    EPSILON,
    HINT,
    PatchEmbed,
    QwenVisionConfig,
    VisionBlock,
    rotary_angles,
)
from vlmport.graph.builder import OpBuilder
from vlmport.graph.few_bits import Stored
from vlmport.graph.grids import Patches, frames_of
from vlmport.graph.layers import ACTIVATIONS, LayerNorm, Linear
from vlmport.graph.parameters import Format

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class Qwen3VisionConfig(QwenVisionConfig):
    """The keys that the graph needs, with Hugging Face's defaults (transformers 5.23)."""

    depth: Layers = 27
    hidden_size: Size = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: Size = 4304
    num_heads: Size = 16
    out_hidden_size: Size = 3584
    patch_size: Size = 16
    num_position_embeddings: Size = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **QwenVisionConfig.must_be,
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    }

    def check(self, where: str) -> None:
        """Raise ConfigError for what the graph can't compute."""
        super().check(where)
        layers = self.deepstack_visual_indexes
        if len(set(layers)) < len(layers) or any(layer >= self.depth for layer in layers):
            raise ConfigError(
                f"{where}: deepstack_visual_indexes {list(layers)}, expected different layers "
                f"below {self.depth}",
                hint=HINT,
                code="config.wrong-value",
            )

    @property
    def side(self) -> int:
        """The side of the square of learnt positions."""
        return math.isqrt(self.num_position_embeddings)


class PositionTable(Stored):
    """Learnt positions of a square, for grids of any size: between four of them, bilinearly."""

    def __init__(self, config: Qwen3VisionConfig, form: Format):
        super().__init__((config.num_position_embeddings, config.hidden_size), form)
        self.side, self.dtype = config.side, form.dtype

    def forward(self, op: OpBuilder, patches: Patches) -> ir.Value:
        """[1, N, D]."""
        rows = self._taps(op, patches.row, patches.height)
        columns = self._taps(op, patches.column, patches.width)
        table, total = self.tensor(op), None
        for row, above in rows:
            for column, beside in columns:
                weight = op.Unsqueeze(op.Mul(above, beside), [1])  # [N, 1]
                if self.dtype != FLOAT:
                    weight = op.Cast(weight, to=self.dtype)
                place = op.Add(op.Mul(row, self.side), column)
                part = op.Mul(op.Gather(table, place), weight)
                total = part if total is None else op.Add(total, part)
        return op.Unsqueeze(total, [0])

    def _taps(
        self, op: OpBuilder, index: ir.Value, size: ir.Value
    ) -> tuple[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]]:
        """Along one axis, the two neighbours i64 [N] of each patch and their weights f32 [N]."""
        steps = op.Cast(op.Max(op.Sub(size, 1), 1), to=FLOAT)
        at = op.Div(op.Mul(op.Cast(index, to=FLOAT), float(self.side - 1)), steps)
        floor = op.Floor(at)
        first, rest = op.Cast(floor, to=INT64), op.Sub(at, floor)
        last = op.Constant(value_int=self.side - 1)
        return (
            (op.Min(first, last), op.Sub(1.0, rest)),
            (op.Min(op.Add(first, 1), last), op.Sub(1.0, op.Abs(op.Sub(rest, 1.0)))),
        )


class MLP(nn.Module):
    def __init__(self, config: Qwen3VisionConfig, form: Format):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.linear_fc1 = Linear(width, inner, bias=True, form=form)
        self.linear_fc2 = Linear(inner, width, bias=True, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.linear_fc2(op, self.activation(op, self.linear_fc1(op, x)))


class Block(VisionBlock):
    def __init__(self, config: Qwen3VisionConfig, form: Format):
        norm = partial(LayerNorm, config.hidden_size, EPSILON, form)
        super().__init__(config, norm, MLP(config, form), form)


class Merger(nn.Module):
    """Patches [1, N, V] that become one token side by side, then two matrices: [N / m², D]."""

    def __init__(self, config: Qwen3VisionConfig, form: Format, *, norm_after: bool):
        super().__init__()
        self.wide = config.hidden_size * config.merged
        self.norm_after = norm_after
        self.norm = LayerNorm(self.wide if norm_after else config.hidden_size, EPSILON, form)
        self.linear_fc1 = Linear(self.wide, self.wide, bias=True, form=form)
        self.linear_fc2 = Linear(self.wide, config.out_hidden_size, bias=True, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        if self.norm_after:
            x = self.norm(op, op.Reshape(x, [-1, self.wide]))
        else:
            x = op.Reshape(self.norm(op, x), [-1, self.wide])
        return self.linear_fc2(op, ACTIVATIONS["gelu"](op, self.linear_fc1(op, x)))


class VisionTower(nn.Module):
    """pixel_values f32[N, K], image_grid_thw i64[num_images, 3] → features [T, D·(1+n)].

    The n DeepStack lanes come after the features, in the order of the layers that they come
    from. The result has the floats of the form; pixels are always float32.
    """

    def __init__(self, config: Qwen3VisionConfig, form: Format, name: str | None = None):
        super().__init__(name)
        self.config, self.form = config, form
        self.patch_embed = PatchEmbed(config, bias=True, form=form)
        self.pos_embed = PositionTable(config, form)
        self.blocks = nn.ModuleList([Block(config, form) for _ in range(config.depth)])
        self.merger = Merger(config, form, norm_after=False)
        lanes = config.deepstack_visual_indexes
        self.deepstack_merger_list = nn.ModuleList(
            [Merger(config, form, norm_after=True) for _ in lanes]
        )

    def forward(self, op: OpBuilder, pixels: ir.Value, grids: ir.Value) -> ir.Value:
        config, dtype = self.config, self.form.dtype
        frames = frames_of(op, grids, op.Shape(pixels, end=1), config.spatial_merge_size)
        patches = frames.patches(op, config.spatial_merge_size)
        whole = FrameAttention.over(op, frames.sizes, config.num_heads, dtype)
        angles = rotary_angles(op, patches, config, dtype)
        if dtype != FLOAT:
            pixels = op.Cast(pixels, to=dtype)
        x = op.Add(self.patch_embed(op, pixels), self.pos_embed(op, patches))  # [1, N, V]
        lanes = []
        for number, block in enumerate(self.blocks):
            x = block(op, x, angles, whole)
            if number in config.deepstack_visual_indexes:
                merger = config.deepstack_visual_indexes.index(number)
                lanes.append(self.deepstack_merger_list[merger](op, x))
        features = self.merger(op, x)
        return op.Concat(features, *lanes, axis=-1) if lanes else features
