"""A Llama-type decoder with a cache: Llama, SmolLM, SmolLM2.

Source: transformers 5.23, modeling_llama.py. The graph's inputs and outputs are the Hub's
decoder_model_merged: any client of that contract can run it.

Traps:
- `seqlens_k` counts to the last 1 of the mask, not its sum: only so is left padding right too.
- Rotary embedding stands outside GroupQueryAttention, whose own is wrong for positions that do
  not start at 0 and refuses head sizes that 16 does not divide.
- The cache may be longer than what is valid (a preallocated buffer): everything follows the
  mask's length, nothing the cache's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import nn

from vlmport.checkpoint import Layers, LazyTensor, Size, read_config, subsection
from vlmport.errors import ConfigError
from vlmport.graph.builder import MICROSOFT, GraphBuilder, OpBuilder, add_output, new_graph
from vlmport.graph.layers import ACTIVATIONS, Embedding, Linear, RMSNorm
from vlmport.graph.weights import FLOAT32, Format

FLOAT, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32
MASKED = -10000.0  # added to scores of padded positions: exp() of it is 0, float16 holds it well

Past = tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class LlamaConfig:
    """What the graph needs of a Llama config, with Hugging Face's defaults (transformers 5.23)."""

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Size = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    must_be: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_interleaved": (False,),
    }

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> LlamaConfig:
        """From a config.json section, in the transformers-4 or -5 spelling of the rope settings.

        Raises ConfigError for values that this decoder does not compute.
        """
        config = read_config(cls, {**raw, **_rope_theta(raw, where)}, where)
        config.check_heads(where)
        if config.rope_theta <= 0:
            raise ConfigError(
                f"{where}: rope_theta {config.rope_theta:g}, expected more than 0",
                hint="is the file of another model? 10000 is the usual base",
            )
        return config

    def check_heads(self, where: str) -> None:
        """Raise ConfigError for heads that the graph can't compute."""
        if self.hidden_size % self.heads and self.head_dim is None:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.heads}",
                hint="set head_dim",
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {self.heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}",
                hint="each key-value head serves the same number of heads",
            )
        if self.head_size % 8:
            raise ConfigError(
                f"{where}: head_dim {self.head_size}, expected a multiple of 8",
                hint="ONNX Runtime's GroupQueryAttention takes no other",
            )

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


def _rope_theta(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta`, from wherever a config says it. Raises ConfigError for scaled rotary angles.

    transformers 5 writes `rope_parameters`, 4 `rope_scaling`; where both stand they must agree.
    """
    sections = [subsection(raw, name, where) for name in ("rope_parameters", "rope_scaling")]
    kinds = {rope.get("rope_type", rope.get("type", "default")) for rope in sections if rope}
    if kinds - {"default"}:
        raise ConfigError(
            f"{where}: rope_type={', '.join(sorted(map(repr, kinds)))}, expected 'default'",
            hint="scaled rotary embeddings are not supported yet",
        )
    thetas = [rope["rope_theta"] for rope in (*sections, raw) if "rope_theta" in rope]
    if any(theta != thetas[0] for theta in thetas):
        raise ConfigError(
            f"{where}: rope_theta is given as {', '.join(map(repr, thetas))}",
            hint="rope_parameters, rope_scaling and rope_theta must agree",
        )
    return {"rope_theta": thetas[0]} if thetas else {}


class Step:
    """What all layers of one run share: lengths, the padding bias and the rotary angles."""

    def __init__(
        self,
        op: OpBuilder,
        config: LlamaConfig,
        x: ir.Value,
        mask: ir.Value,
        positions: ir.Value,
        dtype: ir.DataType = FLOAT,
    ):
        """x [B, S, D], mask i64[B, P+S], positions i64[B, S]; bias and angles are of `dtype`."""
        length = op.Shape(mask, start=1, end=2)  # [1]: P+S
        count = op.Add(op.Range(0, op.Squeeze(length, [0]), 1), 1)  # 1 … P+S
        last = op.ReduceMax(op.Mul(mask, count), [1], keepdims=0)  # [B]
        self.seqlens_k = op.Cast(op.Sub(last, 1), to=INT32)
        self.total = op.Cast(op.Squeeze(length, [0]), to=INT32)
        bias = op.Where(op.Cast(mask, to=ir.DataType.BOOL), 0.0, MASKED)  # [B, P+S]
        shape = op.Concat([1], [1], op.Shape(x, start=1, end=2), length, axis=0)
        bias = op.Expand(op.Unsqueeze(bias, [1, 2]), shape)  # [B, 1, S, P+S]
        cos, sin = rotary_angles(op, positions, config.head_size, config.rope_theta)
        self.bias, self.cos, self.sin = (cast(op, value, dtype) for value in (bias, cos, sin))


def cast(op: OpBuilder, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A float32 value in other floats, or itself."""
    return x if dtype == FLOAT else op.Cast(x, to=dtype)


def rotary_angles(
    op: OpBuilder, positions: ir.Value, head_dim: int, theta: float
) -> tuple[ir.Value, ir.Value]:
    """cos and sin f32[B, S, head_dim/2], computed in the graph: no table, no longest position.

    Source: transformers 5.23, LlamaRotaryEmbedding, which computes them in float32 too.
    """
    frequencies = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    table = op.Constant(value_floats=frequencies)
    angles = op.Mul(op.Unsqueeze(op.Cast(positions, to=FLOAT), [2]), table)
    return op.Cos(angles), op.Sin(angles)


class Attention(nn.Module):
    """Grouped-query attention over past and new keys.

    Queries, keys and values are one matrix, and queries and keys are rotated together: a decode
    step is a fifth faster so, the longest prefill a fiftieth slower.
    """

    def __init__(self, config: LlamaConfig, form: Format):
        super().__init__()
        self.config = config
        width, size, bias = config.hidden_size, config.head_size, config.attention_bias
        keys = config.kv_heads * size
        parts = {"q_proj": config.heads * size, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = Linear(width, parts, bias=bias, form=form)
        self.o_proj = Linear(config.heads * size, width, bias=bias, form=form)

    def forward(self, op: OpBuilder, x: ir.Value, step: Step, past: Past) -> tuple[ir.Value, Past]:
        """x f32[B, S, D] → f32[B, S, D] and the cache [B, K, P+S, head_dim] twice."""
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        sizes = [(heads + kv_heads) * size, kv_heads * size]
        rotated, values = op.Split(self.qkv_proj(op, x), sizes, axis=-1, _outputs=2)
        rotated = op.RotaryEmbedding(rotated, step.cos, step.sin, num_heads=heads + kv_heads)
        y, key, value = op.GroupQueryAttention(
            op.Concat(rotated, values, axis=-1),  # [B, S, (H + 2K)·head_dim]
            None,
            None,
            *past,
            step.seqlens_k,
            step.total,
            None,
            None,
            None,
            step.bias,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=0,
            _domain=MICROSOFT,
            _outputs=3,
        )
        return self.o_proj(op, y), (key, value)


class MLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, form: Format):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.hidden_act]
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = Linear(width, parts, bias=bias, form=form)
        self.down_proj = Linear(inner, width, bias=bias, form=form)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        halves = [self.down_proj.inputs] * 2
        gate, up = op.Split(self.gate_up_proj(op, x), halves, axis=-1, _outputs=2)
        return self.down_proj(op, op.Mul(self.activation(op, gate), up))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm; the residual sum is carried into the next norm."""

    def __init__(self, config: LlamaConfig, form: Format):
        super().__init__()
        self.self_attn = Attention(config, form)
        self.mlp = MLP(config, form)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, form)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, form)

    def forward(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, step: Step, past: Past
    ) -> tuple[ir.Value, ir.Value, Past]:
        normed, total = self.input_layernorm(op, x, residual)
        y, present = self.self_attn(op, normed, step, past)
        normed, total = self.post_attention_layernorm(op, y, total)
        return self.mlp(op, normed), total, present


class LlamaModel(nn.Module):
    """The layers and the last norm."""

    def __init__(self, config: LlamaConfig, form: Format):
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([DecoderLayer(config, form) for _ in layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, form)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, pasts: list[Past]
    ) -> tuple[ir.Value, list[Past]]:
        residual, presents = None, []
        for layer, past in zip(self.layers, pasts, strict=True):
            x, residual, present = layer(op, x, residual, step, past)
            presents.append(present)
        return self.norm(op, x, residual)[0], presents


class LlamaForCausalLM(nn.Module):
    """The model and its head. `name` is the module's name in the checkpoint ('' for none)."""

    def __init__(self, config: LlamaConfig, name: str, form: Format, head: Format):
        super().__init__(name)
        self.model = LlamaModel(config, form)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, form=head)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, pasts: list[Past], keep: ir.Value
    ) -> tuple[ir.Value, list[Past]]:
        """Logits of the last `keep` rows (0: of all) and the cache."""
        hidden, presents = self.model(op, x, step, pasts)
        # -0 is 0: a slice from the start keeps every row.
        hidden = op.Slice(hidden, op.Reshape(op.Neg(keep), [1]), [2**62], [1])
        return self.lm_head(op, hidden), presents


def decoder_graph(
    config: LlamaConfig, name: str = "", form: Format = FLOAT32, head: Format = FLOAT32
) -> GraphBuilder:
    """decoder_model_merged: embeddings, mask, positions and cache → logits and cache.

    Embeddings and logits are float32 at every precision, as clients expect; the cache has the
    floats of the form.
    """
    builder = new_graph("decoder_model_merged")
    op, dtype = builder.op, form.dtype
    rows, past_length = "batch_size", "past_sequence_length"
    embeds = builder.input("inputs_embeds", FLOAT, [rows, "sequence_length", config.hidden_size])
    mask = builder.input("attention_mask", INT64, [rows, "total_sequence_length"])
    positions = builder.input("position_ids", INT64, [rows, "sequence_length"])
    keep = builder.input("num_logits_to_keep", INT64, [])
    cache = [rows, config.kv_heads, past_length, config.head_size]
    pasts: list[Past] = []
    for i in range(config.num_hidden_layers):
        key = builder.input(f"past_key_values.{i}.key", dtype, cache)
        pasts.append((key, builder.input(f"past_key_values.{i}.value", dtype, cache)))

    model = LlamaForCausalLM(config, name, form, head)
    step = Step(op, config, embeds, mask, positions, dtype)
    logits, presents = model(op, cast(op, embeds, dtype), step, pasts, keep)
    if dtype != FLOAT:
        logits = op.Cast(logits, to=FLOAT)

    add_output(builder, logits, "logits", FLOAT, [rows, "num_logits", config.vocab_size])
    cache = [rows, config.kv_heads, "total_sequence_length", config.head_size]
    for i, (key, value) in enumerate(presents):
        add_output(builder, key, f"present.{i}.key", dtype, cache)
        add_output(builder, value, f"present.{i}.value", dtype, cache)
    return builder


class TokenEmbedding(nn.Module):
    """The embedding under its checkpoint name: `<name>.model.embed_tokens`."""

    def __init__(self, config: LlamaConfig, name: str, form: Format, extra_rows: int):
        super().__init__(f"{name}.model" if name else "model")
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, extra_rows=extra_rows, form=form
        )

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        return self.embed_tokens(op, ids)


def embed_graph(
    config: LlamaConfig, name: str = "", form: Format = FLOAT32, extra_rows: int = 0
) -> GraphBuilder:
    """embed_tokens: input_ids i64[B, S] → inputs_embeds f32[B, S, D]."""
    builder = new_graph("embed_tokens")
    dims = ["batch_size", "sequence_length"]
    ids = builder.input("input_ids", INT64, dims)
    embeds = TokenEmbedding(config, name, form, extra_rows)(builder.op, ids)
    add_output(builder, embeds, "inputs_embeds", FLOAT, [*dims, config.hidden_size])
    return builder


def tied_head(
    tensors: Mapping[str, LazyTensor], config: LlamaConfig, name: str
) -> Mapping[str, LazyTensor]:
    """The tensors with the head's weight being the embedding's, where the config ties them.

    As in transformers, a head stored beside a tied embedding is not read.
    """
    if not config.tie_word_embeddings:
        return tensors
    prefix = f"{name}." if name else ""
    embedding = tensors.get(f"{prefix}model.embed_tokens.weight")
    tied = {} if embedding is None else {f"{prefix}lm_head.weight": embedding}
    return {**tensors, **tied}
