"""A Llama-type decoder with a cache: Llama, SmolLM, SmolLM2, and the text side of Qwen-VL.

Source: transformers 5.23, modeling_llama.py, modeling_qwen2_5_vl.py and modeling_qwen3_vl.py. The
graph's inputs and outputs are the Hub's decoder_model_merged: any client of that contract can run
it. An embedding may carry further lanes (DeepStack) behind its own values: lane k is added after
layer k. They are zeros where there is no image, so no mask is needed.

Traps:
- `seqlens_k` counts to the last 1 of the mask, not its sum: otherwise left padding would be wrong.
- Rotary embedding is outside GroupQueryAttention, whose own is wrong for positions that do not
  start at 0 and refuses head sizes that 16 does not divide.
- The cache may be longer than its valid part (a preallocated buffer): everything follows the mask's
  length, nothing the cache's.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from vlmport.graph.builder import MICROSOFT, GraphBuilder, OpBuilder, add_output, new_graph
from vlmport.graph.decoder_config import DecoderConfig as DecoderConfig
from vlmport.graph.layers import Embedding, GatedMLP, Linear, RMSNorm, SkipRMSNorm
from vlmport.graph.mrope import mrope_angles
from vlmport.graph.parameters import FLOAT32, Format
from vlmport.graph.rotary import rotary_angles

FLOAT, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32
MASKED = -10000.0  # added to scores of padded positions: exp() of it is 0, float16 holds it well

Past = tuple[ir.Value, ir.Value]


class Step:
    """The values that all layers of one run share: lengths, the padding bias, the rotary angles."""

    def __init__(
        self,
        op: OpBuilder,
        config: DecoderConfig,
        x: ir.Value,
        mask: ir.Value,
        positions: ir.Value,
        dtype: ir.DataType = FLOAT,
    ):
        """x [B, S, …], mask i64[B, P+S], positions i64[B, S], or i64[3, B, S] in time, height and
        width; bias and angles are of `dtype`."""
        length = op.Shape(mask, start=1, end=2)  # [1]: P+S
        count = op.Add(op.Range(0, op.Squeeze(length, [0]), 1), 1)  # 1 … P+S
        last = op.ReduceMax(op.Mul(mask, count), [1], keepdims=0)  # [B]
        self.seqlens_k = op.Cast(op.Sub(last, 1), to=INT32)
        self.total = op.Cast(op.Squeeze(length, [0]), to=INT32)
        bias = op.Where(op.Cast(mask, to=ir.DataType.BOOL), 0.0, MASKED)  # [B, P+S]
        shape = op.Concat([1], [1], op.Shape(x, start=1, end=2), length, axis=0)
        bias = op.Expand(op.Unsqueeze(bias, [1, 2]), shape)  # [B, 1, S, P+S]
        cos, sin = _angles(op, config, positions)
        self.bias, self.cos, self.sin = (cast(op, value, dtype) for value in (bias, cos, sin))


def cast(op: OpBuilder, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Cast a float32 value to other floats if needed."""
    return x if dtype == FLOAT else op.Cast(x, to=dtype)


def _angles(op: OpBuilder, config: DecoderConfig, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    if config.mrope_section is None:
        return rotary_angles(op, positions, config.head_size, config.rope_theta)
    section, interleaved = config.mrope_section, config.mrope_interleaved
    return mrope_angles(
        op, positions, config.head_size, config.rope_theta, section, interleaved=interleaved
    )


class Attention(nn.Module):
    """Grouped-query attention over past and new keys.

    Queries, keys and values are one matrix, and queries and keys are rotated together: a decode
    step is a fifth faster so, the longest prefill a fiftieth slower.
    """

    def __init__(self, config: DecoderConfig, form: Format):
        super().__init__()
        self.config = config
        width, size, bias = config.hidden_size, config.head_size, config.attention_bias
        keys = config.kv_heads * size
        parts = {"q_proj": config.heads * size, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = Linear(width, parts, bias=bias or config.qkv_bias, form=form)
        self.o_proj = Linear(config.heads * size, width, bias=bias, form=form)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps, form)
            self.k_norm = RMSNorm(size, config.rms_norm_eps, form)

    def forward(self, op: OpBuilder, x: ir.Value, step: Step, past: Past) -> tuple[ir.Value, Past]:
        """x f32[B, S, D] → f32[B, S, D] and the cache [B, K, P+S, head_dim] twice."""
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        sizes = [(heads + kv_heads) * size, kv_heads * size]
        rotated, values = op.Split(self.qkv_proj(op, x), sizes, axis=-1, _outputs=2)
        if self.config.qk_norm:
            rotated = self._normalised(op, rotated)
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

    def _normalised(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Normalise queries and keys [B, S, (H+K)·head_dim], each head by itself."""
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        x = op.Reshape(x, [0, 0, heads + kv_heads, size])
        queries, keys = op.Split(x, [heads, kv_heads], axis=2, _outputs=2)
        x = op.Concat(self.q_norm(op, queries), self.k_norm(op, keys), axis=2)
        return op.Reshape(x, [0, 0, (heads + kv_heads) * size])


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm; the residual sum is carried into the next norm."""

    def __init__(self, config: DecoderConfig, form: Format):
        super().__init__()
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, form)
        self.mlp = GatedMLP(
            width, config.intermediate_size, config.hidden_act, bias=config.mlp_bias, form=form
        )
        self.input_layernorm = SkipRMSNorm(width, epsilon, form)
        self.post_attention_layernorm = SkipRMSNorm(width, epsilon, form)

    def forward(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, step: Step, past: Past
    ) -> tuple[ir.Value, ir.Value, Past]:
        normed, total = self.input_layernorm(op, x, residual)
        y, present = self.self_attn(op, normed, step, past)
        normed, total = self.post_attention_layernorm(op, y, total)
        return self.mlp(op, normed), total, present


class DecoderLayers(nn.Module):
    """The layers and the last norm."""

    def __init__(self, config: DecoderConfig, form: Format):
        super().__init__()
        self.config = config
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([DecoderLayer(config, form) for _ in layers])
        self.norm = SkipRMSNorm(config.hidden_size, config.rms_norm_eps, form)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, pasts: list[Past]
    ) -> tuple[ir.Value, list[Past]]:
        """x [B, S, D·(1+n)] with n lanes → [B, S, D]."""
        residual, presents = None, []
        x, lanes = self._lanes(op, x)
        for layer, past, lane in zip(self.layers, pasts, lanes, strict=True):
            x, residual, present = layer(op, x, residual, step, past)
            x = x if lane is None else op.Add(x, lane)
            presents.append(present)
        return self.norm(op, x, residual)[0], presents

    def _lanes(self, op: OpBuilder, x: ir.Value) -> tuple[ir.Value, list[ir.Value | None]]:
        """Split off the embeddings, and the lanes that are added after each layer."""
        count, layers = self.config.deepstack_lanes, self.config.num_hidden_layers
        if not count:
            return x, [None] * layers
        widths = [self.config.hidden_size] * (1 + count)
        x, *lanes = op.Split(x, widths, axis=-1, _outputs=1 + count)
        return x, [*lanes, *[None] * (layers - count)]


class DecoderWithHead(nn.Module):
    """The model and its head. `name` is the module's name in the checkpoint ('' for none)."""

    def __init__(self, config: DecoderConfig, name: str, form: Format, head: Format):
        super().__init__(name)
        self.model = DecoderLayers(config, form)
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
    config: DecoderConfig,
    name: str = "",
    form: Format = FLOAT32,
    head: Format = FLOAT32,
    *,
    last_only: bool = False,
) -> GraphBuilder:
    """decoder_model_merged: embeddings, mask, positions and cache → logits and cache.

    Embeddings and logits are float32 at every precision, as clients expect; the cache has the
    floats of the form.

    Args:
        last_only: give logits of the last row, [B, 1, V], without the input num_logits_to_keep.
    """
    builder = new_graph("decoder_model_merged")
    op, dtype = builder.op, form.dtype
    rows, past_length = "batch_size", "past_sequence_length"
    embeds = builder.input("inputs_embeds", FLOAT, [rows, "sequence_length", config.embeds_size])
    mask = builder.input("attention_mask", INT64, [rows, "total_sequence_length"])
    axes = [3] if config.mrope_section else []  # time, height, width
    positions = builder.input("position_ids", INT64, [*axes, rows, "sequence_length"])
    if last_only:
        keep, num_logits = op.Constant(value_int=1), 1
    else:
        keep, num_logits = builder.input("num_logits_to_keep", INT64, []), "num_logits"
    cache = [rows, config.kv_heads, past_length, config.head_size]
    pasts: list[Past] = []
    for i in range(config.num_hidden_layers):
        key = builder.input(f"past_key_values.{i}.key", dtype, cache)
        pasts.append((key, builder.input(f"past_key_values.{i}.value", dtype, cache)))

    model = DecoderWithHead(config, name, form, head)
    step = Step(op, config, embeds, mask, positions, dtype)
    logits, presents = model(op, cast(op, embeds, dtype), step, pasts, keep)
    if dtype != FLOAT:
        logits = op.Cast(logits, to=FLOAT)

    add_output(builder, logits, "logits", FLOAT, [rows, num_logits, config.vocab_size])
    cache = [rows, config.kv_heads, "total_sequence_length", config.head_size]
    for i, (key, value) in enumerate(presents):
        add_output(builder, key, f"present.{i}.key", dtype, cache)
        add_output(builder, value, f"present.{i}.value", dtype, cache)
    return builder


class TokenEmbedding(nn.Module):
    """The embedding under its checkpoint name: `<name>.model.embed_tokens`."""

    def __init__(self, config: DecoderConfig, name: str, form: Format, extra_rows: int):
        super().__init__(f"{name}.model" if name else "model")
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, extra_rows=extra_rows, form=form
        )

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        return self.embed_tokens(op, ids)


def with_lanes(op: OpBuilder, embeds: ir.Value, config: DecoderConfig) -> ir.Value:
    """[B, S, D] → [B, S, D·(1+n)], zeros in n lanes."""
    if not config.deepstack_lanes:
        return embeds
    return op.Pad(embeds, [0, 0, 0, 0, 0, config.deepstack_lanes * config.hidden_size])


def embed_graph(
    config: DecoderConfig, name: str = "", form: Format = FLOAT32, extra_rows: int = 0
) -> GraphBuilder:
    """embed_tokens: input_ids i64[B, S] → inputs_embeds f32[B, S, D·(1+n)], zeros in n lanes."""
    builder = new_graph("embed_tokens")
    dims = ["batch_size", "sequence_length"]
    ids = builder.input("input_ids", INT64, dims)
    embeds = TokenEmbedding(config, name, form, extra_rows)(builder.op, ids)
    embeds = with_lanes(builder.op, embeds, config)
    add_output(builder, embeds, "inputs_embeds", FLOAT, [*dims, config.embeds_size])
    return builder
