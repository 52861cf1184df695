"""The common parts of the vision towers of Qwen2.5-VL and Qwen3-VL.

Source: transformers 5.23, modeling_qwen2_5_vl.py and modeling_qwen3_vl.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import onnx_ir as ir
from onnxscript import nn

from vlmport.checkpoint import Layers, Size, read_config, subsection
from vlmport.errors import ConfigError
from vlmport.graph.builder import OpBuilder
from vlmport.graph.few_bits import Stored
from vlmport.graph.grids import Patches
from vlmport.graph.layers import Linear
from vlmport.graph.parameters import Format, Weight
from vlmport.graph.rotary import frequencies

FLOAT = ir.DataType.FLOAT
HINT = "does the file belong to this model?"
EPSILON = 1e-6  # of every norm; no config has it


@dataclass(frozen=True)
class QwenVisionConfig:
    """The keys of vision_config that both graphs need; the defaults are the subclasses' own."""

    depth: Layers
    hidden_size: Size
    hidden_act: str
    intermediate_size: Size
    num_heads: Size
    out_hidden_size: Size
    patch_size: Size
    in_channels: Size = 3
    spatial_merge_size: Size = 2
    temporal_patch_size: Size = 2
    rope_theta: float = 10000.0

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {"in_channels": (3,)}

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Read a section of config.json. Raises ConfigError."""
        rope = subsection(raw, "rope_parameters", where)
        kind = rope.get("rope_type", "axial")
        if kind not in ("axial", "default"):  # transformers turns the second into the first
            raise ConfigError(
                f"{where}: rope_parameters: rope_type={kind!r}, expected 'axial'",
                hint=HINT,
                code="config.unsupported-value",
            )
        theta = {key: rope[key] for key in ("rope_theta",) if key in rope}
        config = read_config(cls, {**raw, **theta}, where)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise ConfigError for what the graph can't compute."""
        if self.hidden_size % self.num_heads or self.head_size % 4:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} by num_heads {self.num_heads} is "
                f"{self.hidden_size / self.num_heads:g}, expected a multiple of 4",
                hint=f"half of a head turns with the row, half with the column; {HINT}",
                code="config.unsupported-value",
            )
        if self.rope_theta <= 0:
            raise ConfigError(
                f"{where}: rope_theta {self.rope_theta:g}", hint=HINT, code="config.wrong-value"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_width(self) -> int:
        """Numbers in a row of pixel_values."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


class PatchProjection(Stored):
    """A convolution whose kernel is the whole patch: one matrix, of the kernel's five axes."""

    def __init__(self, config: QwenVisionConfig, bias: bool, form: Format):
        size = (config.patch_size, config.patch_size)
        kernel = (config.hidden_size, config.in_channels, config.temporal_patch_size, *size)
        super().__init__(kernel, form)
        self.width = config.patch_width
        self.bias = Weight((config.hidden_size,), dtype=form.dtype) if bias else None

    def forward(self, op: OpBuilder, rows: ir.Value) -> ir.Value:
        """[N, K] → [1, N, D]."""
        matrix = op.Reshape(self.tensor(op), [-1, self.width])
        bias = () if self.bias is None else (self.bias,)
        return op.Unsqueeze(op.Gemm(rows, matrix, *bias, transB=1), [0])


class PatchEmbed(nn.Module):
    """A module of its own for the name `patch_embed.proj`."""

    def __init__(self, config: QwenVisionConfig, bias: bool, form: Format):
        super().__init__()
        self.proj = PatchProjection(config, bias, form)

    def forward(self, op: OpBuilder, rows: ir.Value) -> ir.Value:
        """[N, K] → [1, N, D]."""
        return self.proj(op, rows)


def rotary_angles(
    op: OpBuilder, patches: Patches, config: QwenVisionConfig, dtype: ir.DataType = FLOAT
) -> tuple[ir.Value, ir.Value]:
    """cos and sin [1, N, head_dim/2]: one half of the frequencies turns by rows, one by columns."""
    table = frequencies(op, config.head_size // 2, config.rope_theta)
    angles = op.Concat(
        *(
            op.Mul(op.Unsqueeze(op.Cast(at, to=FLOAT), [1]), table)
            for at in (patches.row, patches.column)
        ),
        axis=1,
    )
    angles = op.Unsqueeze(angles, [0])
    cos, sin = op.Cos(angles), op.Sin(angles)
    return (cos, sin) if dtype == FLOAT else (op.Cast(cos, to=dtype), op.Cast(sin, to=dtype))


class Attending(Protocol):
    """Attention within frames, or within windows."""

    def attend(self, op: OpBuilder, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """q, k, v [1, N, D] → [1, N, D]."""
        ...


class VisionAttention(nn.Module):
    """Attention whose queries and keys are rotated by row and column; qkv is one matrix."""

    def __init__(self, config: QwenVisionConfig, form: Format):
        super().__init__()
        self.heads, self.width = config.num_heads, config.hidden_size
        self.qkv = Linear(self.width, 3 * self.width, bias=True, form=form)
        self.proj = Linear(self.width, self.width, bias=True, form=form)

    def forward(
        self, op: OpBuilder, x: ir.Value, angles: tuple[ir.Value, ir.Value], among: Attending
    ) -> ir.Value:
        """x [1, N, D] → [1, N, D]."""
        parts = [2 * self.width, self.width]
        rotated, v = op.Split(self.qkv(op, x), parts, axis=-1, _outputs=2)
        rotated = op.RotaryEmbedding(rotated, *angles, num_heads=2 * self.heads)
        q, k = op.Split(rotated, axis=-1, num_outputs=2, _outputs=2)
        return self.proj(op, among.attend(op, q, k, v))


class VisionBlock(nn.Module):
    """Attention, then an MLP, each added to what its norm was taken of."""

    def __init__(
        self, config: QwenVisionConfig, norm: Callable[[], nn.Module], mlp: nn.Module, form: Format
    ):
        """`norm` makes a norm as the tower has it, `mlp` is the tower's own."""
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = VisionAttention(config, form)
        self.mlp = mlp

    def forward(
        self, op: OpBuilder, x: ir.Value, angles: tuple[ir.Value, ir.Value], among: Attending
    ) -> ir.Value:
        """x [1, N, D] → [1, N, D]."""
        x = op.Add(x, self.attn(op, self.norm1(op, x), angles, among))
        return op.Add(x, self.mlp(op, self.norm2(op, x)))
