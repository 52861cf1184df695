"""The SigLIP vision tower: patches of a square image → hidden states after the last norm.

Source: transformers 5.23, modeling_siglip.py. The pooling head is in siglip_head.py: only a layout
that other programs read has it, no caption does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import onnx_ir as ir
from onnxscript import nn

from vlmport.checkpoint import Layers, Size, read_config
from vlmport.errors import ConfigError
from vlmport.graph.builder import MICROSOFT, OpBuilder
from vlmport.graph.few_bits import Stored
from vlmport.graph.layers import ACTIVATIONS, LayerNorm, Linear
from vlmport.graph.parameters import Format, Weight

MAX_PATCHES = 1 << 20  # attention over as many would need terabytes


@dataclass(frozen=True)
class SiglipVisionConfig:
    """The keys that the graph needs, with Hugging Face's defaults (transformers 5.23)."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size = 224
    patch_size: Size = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "num_channels": (3,),
    }

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Read a section of config.json. Raises ConfigError."""
        config = read_config(cls, raw, where)
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}",
                hint="is the file of another model?",
                code="config.contradiction",
            )
        if config.image_size < config.patch_size:
            raise ConfigError(
                f"{where}: image_size {config.image_size} is less than patch_size "
                f"{config.patch_size}",
                hint="is the file of another model?",
                code="config.contradiction",
            )
        if config.num_patches > MAX_PATCHES:
            raise ConfigError(
                f"{where}: image_size {config.image_size} and patch_size {config.patch_size} make "
                f"{config.num_patches} patches, at most {MAX_PATCHES} are meant",
                hint="is the file of another model?",
                code="config.unsupported-value",
            )
        return config

    @property
    def side(self) -> int:
        """Patches along one side; a remainder of the image is ignored, as in the original."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.side**2


class PatchEmbedding(Stored):
    """A convolution whose kernel and stride are the patch."""

    def __init__(self, config: SiglipVisionConfig, form: Format):
        self.size = config.patch_size
        super().__init__((config.hidden_size, config.num_channels, self.size, self.size), form)
        self.bias = Weight((config.hidden_size,), dtype=form.dtype)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        square = [self.size, self.size]
        return op.Conv(pixels, self.tensor(op), self.bias, kernel_shape=square, strides=square)


class PositionEmbedding(Stored):
    """The table [N, D], added directly: the image always has the trained size."""

    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__((config.num_patches, config.hidden_size), form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Add(x, self.tensor(op))


class Embeddings(nn.Module):
    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config, form)
        self.position_embedding = PositionEmbedding(config, form)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        """pixels f32[B, 3, H, W] → f32[B, N, D]."""
        patches = self.patch_embedding(op, pixels)  # [B, D, side, side]
        patches = op.Reshape(patches, [0, self.config.hidden_size, self.config.num_patches])
        return self.position_embedding(op, op.Transpose(patches, perm=[0, 2, 1]))


class Attention(nn.Module):
    """Full attention; no mask, every patch is real."""

    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj = Linear(width, width, bias=True, form=form)
        self.k_proj = Linear(width, width, bias=True, form=form)
        self.v_proj = Linear(width, width, bias=True, form=form)
        self.out_proj = Linear(width, width, bias=True, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        y = op.MultiHeadAttention(q, k, v, num_heads=self.heads, _domain=MICROSOFT)
        return self.out_proj(op, y)


class MLP(nn.Module):
    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, form=form)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.fc2(op, self.activation(op, self.fc1(op, x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, form)
        self.self_attn = Attention(config, form)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, form)
        self.mlp = MLP(config, form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x)))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class Encoder(nn.Module):
    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([EncoderLayer(config, form) for _ in layers])

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        for layer in self.layers:
            x = layer(op, x)
        return x


class SiglipVisionTower(nn.Module):
    """pixel_values f32[B, 3, H, W] → last_hidden_state [B, N, D], after post_layernorm.

    The result has the floats of the form; pixels are always float32.
    """

    def __init__(self, config: SiglipVisionConfig, form: Format, name: str | None = None):
        super().__init__(name)
        self.form = form
        self.embeddings = Embeddings(config, form)
        self.encoder = Encoder(config, form)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, form)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        if self.form.dtype != ir.DataType.FLOAT:
            pixels = op.Cast(pixels, to=self.form.dtype)
        x = self.encoder(op, self.embeddings(op, pixels))
        return self.post_layernorm(op, x)
