"""Qwen2.5-VL's vision tower: windows of patches, and a few blocks with attention to whole images.

Source: transformers 5.23, modeling_qwen2_5_vl.py, Qwen2_5_VisionTransformerPretrainedModel, and
vision_utils.py, get_vision_window_index.

The original puts patches into the order of the windows and the features back into their own. Here
they stay in their own order throughout: only what attends within windows is laid out by window.

N patches of all images, W windows, L patches of a whole window, C hidden size.
"""

from __future__ import annotations

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
from vlmport.graph.builder import MICROSOFT, OpBuilder
from vlmport.graph.grids import Frames, Patches, frames_of, starts_of
from vlmport.graph.layers import GatedMLP, Linear, RMSNorm
from vlmport.graph.parameters import Format

FLOAT = ir.DataType.FLOAT
MASKED = -10000.0  # added to scores of what fills a window up: exp() of it is 0, float16 holds it


@dataclass(frozen=True)
class Qwen2_5VisionConfig(QwenVisionConfig):  # noqa: N801, the version is part of the name
    """vision_config, with the defaults of Qwen2_5_VLVisionConfig."""

    depth: Layers = 32
    hidden_size: Size = 3584
    hidden_act: str = "silu"
    intermediate_size: Size = 3420
    num_heads: Size = 16
    out_hidden_size: Size = 3584
    patch_size: Size = 14
    window_size: Size = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **QwenVisionConfig.must_be,
        "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh"),
    }

    def check(self, where: str) -> None:
        super().check(where)
        if not self.window_side:
            raise ConfigError(
                f"{where}: window_size {self.window_size} is less than spatial_merge_size "
                f"{self.spatial_merge_size} patches of {self.patch_size}",
                hint=HINT,
                code="config.contradiction",
            )

    @property
    def window_side(self) -> int:
        """The side of a whole window, in blocks of merged patches."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class WindowAttention:
    """Attention within windows, all of them at once as a batch.

    Attributes:
        rows: i64 [W, L], the patch at each place; where a partial window has none, patch 0.
        bias: [W, 1, L, L], 0 or MASKED.
        places: i64 [N], where in W·L each patch has gone.
    """

    rows: ir.Value
    bias: ir.Value
    places: ir.Value
    heads: int

    @classmethod
    def over(
        cls,
        op: OpBuilder,
        frames: Frames,
        patches: Patches,
        config: Qwen2_5VisionConfig,
        dtype: ir.DataType,
    ) -> WindowAttention:
        """Windows of `window_side` blocks a side; those at the right and lower edge have fewer."""
        merge, side = config.spatial_merge_size, config.window_side
        length = side * merge  # patches along a side
        down, across = (
            op.Div(op.Add(sides, length - 1), length) for sides in (frames.heights, frames.widths)
        )
        counts = op.Mul(down, across)  # [F]
        first, across = (op.Gather(of, patches.frame) for of in (starts_of(op, counts), across))
        window = op.Add(op.Mul(op.Div(patches.row, length), across), op.Div(patches.column, length))
        within = op.Add(op.Mul(op.Mod(patches.row, length), length), op.Mod(patches.column, length))
        places = op.Add(op.Mul(op.Add(first, window), length**2), within)  # [N]

        total = op.Mul(op.ReduceSum(counts, keepdims=1), length**2)  # [1]: W·L
        empty = op.Expand(op.Constant(value_ints=[0]), total)
        number = op.Range(0, op.Squeeze(op.Shape(places), [0]), 1)
        rows = op.ScatterElements(empty, places, number)
        real = op.ScatterElements(
            empty, places, op.Expand(op.Constant(value_ints=[1]), op.Shape(places))
        )
        bias = op.Where(op.Cast(real, to=ir.DataType.BOOL), 0.0, MASKED)
        bias = op.Reshape(bias, [-1, 1, 1, length**2])
        bias = op.Expand(bias, [1, 1, length**2, 1])
        if dtype != FLOAT:
            bias = op.Cast(bias, to=dtype)
        return cls(op.Reshape(rows, [-1, length**2]), bias, places, config.num_heads)

    def attend(self, op: OpBuilder, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """q, k, v [1, N, C] → [1, N, C]."""
        rows = [op.Squeeze(op.Gather(x, self.rows, axis=1), [0]) for x in (q, k, v)]
        y = op.MultiHeadAttention(  # [W, L, C]
            *rows, None, None, self.bias, num_heads=self.heads, _domain=MICROSOFT
        )
        flat = op.Reshape(y, op.Concat([1, -1], op.Shape(q, start=2), axis=0))
        return op.Gather(flat, self.places, axis=1)


class Block(VisionBlock):
    def __init__(self, config: Qwen2_5VisionConfig, form: Format):
        width, inner = config.hidden_size, config.intermediate_size
        norm = partial(RMSNorm, width, EPSILON, form)
        mlp = GatedMLP(width, inner, config.hidden_act, bias=True, form=form)
        super().__init__(config, norm, mlp, form)


class Merger(nn.Module):
    """A module that joins neighbouring patches into one row, then applies two matrices."""

    def __init__(self, config: Qwen2_5VisionConfig, form: Format):
        super().__init__()
        self.inner = config.hidden_size * config.merged
        self.ln_q = RMSNorm(config.hidden_size, EPSILON, form)
        first = Linear(self.inner, self.inner, bias=True, form=form)
        last = Linear(self.inner, config.out_hidden_size, bias=True, form=form)
        self.mlp = nn.ModuleList([first, Gelu(), last])  # in the checkpoint 0 and 2

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[1, N, C] → [N / m², D]."""
        x = op.Reshape(self.ln_q(op, x), [-1, self.inner])
        for layer in self.mlp:
            x = layer(op, x)
        return x


class Gelu(nn.Module):
    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Gelu(x)


class VisionTower(nn.Module):
    """pixel_values f32[N, K], image_grid_thw i64[num_images, 3] → features [N / m², D].

    The result has the floats of the form; pixels are always float32.
    """

    def __init__(self, config: Qwen2_5VisionConfig, form: Format, name: str | None = None):
        super().__init__(name)
        self.config, self.form = config, form
        self.patch_embed = PatchEmbed(config, bias=False, form=form)
        self.blocks = nn.ModuleList([Block(config, form) for _ in range(config.depth)])
        self.merger = Merger(config, form)

    def forward(self, op: OpBuilder, rows: ir.Value, grids: ir.Value) -> ir.Value:
        config, dtype = self.config, self.form.dtype
        frames = frames_of(op, grids, op.Shape(rows, end=1), config.spatial_merge_size)
        patches = frames.patches(op, config.spatial_merge_size)
        angles = rotary_angles(op, patches, config, dtype)
        whole = FrameAttention.over(op, frames.sizes, config.num_heads, dtype)
        windows = WindowAttention.over(op, frames, patches, config, dtype)
        x = self.patch_embed(op, rows if dtype == FLOAT else op.Cast(rows, to=dtype))
        for number, block in enumerate(self.blocks):
            is_whole = number in config.fullatt_block_indexes
            x = block(op, x, angles, whole if is_whole else windows)
        return self.merger(op, x)
