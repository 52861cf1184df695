"""SigLIP's pooling head: the hidden states of all patches → one vector per image.

Source: transformers 5.23, modeling_siglip.py, SiglipMultiheadAttentionPoolingHead.

The query is the same for every image: it is a parameter (`probe`). So query and key matrices become
one row of scores for each head, computed once at export; the key's bias adds the same to every
patch, which a softmax ignores. Only the rows of the values remain of in_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlmport.checkpoint import LazyTensor
from vlmport.checkpoint.lazy_tensor import DerivedTensor
from vlmport.graph.builder import OpBuilder
from vlmport.graph.layers import LayerNorm, Linear
from vlmport.graph.parameters import Format, Weight
from vlmport.graph.siglip import MLP, SiglipVisionConfig


class PooledAttention(nn.Module):
    """Attention of one fixed query over the patches."""

    def __init__(self, config: SiglipVisionConfig, form: Format):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        self.scores = Weight(
            (self.width, self.heads),
            source_shape=(self.heads, self.width),
            convert=lambda load: np.ascontiguousarray(load().T),
            dtype=form.dtype,
        )
        self.v_proj = Linear(self.width, self.width, bias=True, form=form)
        self.out_proj = Linear(self.width, self.width, bias=True, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """x [B, N, D] → [B, D].

        Patches are weighed before the values are made of them, so these are of H rows, not of N.
        Each head reads its own D/H columns of its own row.
        """
        scores = op.Transpose(op.MatMul(x, self.scores), perm=[0, 2, 1])  # [B, H, N]
        mixed = op.MatMul(op.Softmax(scores, axis=-1), x)  # [B, H, D]
        split = [0, self.heads, self.heads, self.width // self.heads]
        values = op.Reshape(self.v_proj(op, mixed), split)  # [B, H, H, D/H]
        own = op.Constant(value=ir.tensor(np.eye(self.heads, dtype=np.float32)[:, :, None]))
        values = op.ReduceSum(op.Mul(values, op.CastLike(own, values)), [2], keepdims=0)
        return self.out_proj(op, op.Reshape(values, [0, self.width]))


class PoolingHead(nn.Module):
    """x [B, N, D] → pooler_output [B, D]. `name` is the head's name in the checkpoint."""

    def __init__(self, config: SiglipVisionConfig, form: Format, name: str):
        super().__init__(name)
        self.attention = PooledAttention(config, form)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, form)
        self.mlp = MLP(config, form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        pooled = self.attention(op, x)
        return op.Add(pooled, self.mlp(op, self.layernorm(op, pooled)))


def folded_head(
    tensors: Mapping[str, LazyTensor], config: SiglipVisionConfig, name: str
) -> Mapping[str, LazyTensor]:
    """Add the tensors that the graph needs instead of probe and in_proj.

    If one of these is missing or has another shape, nothing is added: a graph that needs the head
    then finds its weights unset.
    """
    width, at = config.hidden_size, f"{name}.attention"
    shapes = {
        f"{name}.probe": (1, 1, width),
        f"{at}.in_proj_weight": (3 * width, width),
        f"{at}.in_proj_bias": (3 * width,),
    }
    found = {key: tensors[key] for key in shapes if key in tensors}
    if any(key not in found or found[key].shape != shapes[key] for key in shapes):
        return tensors
    probe, weight, bias = found.values()
    return {
        **tensors,
        f"{at}.scores": ProbeScores(weight, probe, bias, config.num_attention_heads),
        f"{at}.v_proj.weight": LastRows(weight, width),
        f"{at}.v_proj.bias": LastRows(bias, width),
    }


@dataclass(frozen=True)
class LastRows(DerivedTensor):
    """The last `rows` rows of a stored tensor."""

    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.base.shape[1:])

    def numpy(self) -> np.ndarray:
        return self.base.numpy()[-self.rows :].copy()


@dataclass(frozen=True)
class ProbeScores(DerivedTensor):
    """[H, D]: the factors by which each head scores a patch, (probe·Wqᵀ + bq)·Wk / √(D/H).

    `base` is in_proj_weight, of which Wq and Wk are the first two thirds.
    """

    probe: LazyTensor
    bias: LazyTensor
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.heads, self.base.shape[1])

    def numpy(self) -> np.ndarray:
        weight = self.base.numpy().astype(np.float64)
        width = weight.shape[1]
        query = weight[:width] @ self.probe.numpy().reshape(width) + self.bias.numpy()[:width]
        query = query.reshape(self.heads, 1, -1) / np.sqrt(width // self.heads)
        keys = weight[width : 2 * width].reshape(self.heads, -1, width)
        return (query @ keys)[:, 0].astype(np.float32)
