"""A Llama-type decoder in two graphs over the same weights: begin after a prefix, and go on.

`prefix_init` reads a prefix of embeddings and then token ids, of which there may be none;
`language_model` reads token ids and a cache. Both are written with the same modules, so their
weights have the same names and can be in one file.

Source of the inputs and outputs: distilvit2's export, and optimum's for `language_model`. The names
of dimensions are theirs too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlmport.graph.builder import GraphBuilder, OpBuilder, add_output, new_graph
from vlmport.graph.decoder import (
    DecoderConfig,
    DecoderWithHead,
    Past,
    Step,
    TokenEmbedding,
    cast,
)
from vlmport.graph.layers import Linear
from vlmport.graph.precision import Precision

FLOAT, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32
UINT8 = ir.DataType.UINT8


class TiedHead(Linear):
    """A head whose matrix is the embedding too: multiplied with, or looked up in.

    Looked up by standard operators, which every build of ONNX Runtime has.
    """

    def forward(self, op: OpBuilder, x: ir.Value, *, look_up: bool = False) -> ir.Value:
        """Logits of x f32[B, S, D], or with `look_up` the rows [B, S, D] of x i64[B, S]."""
        return self._rows(op, x) if look_up else super().forward(op, x)

    def _rows(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        if self.form.bits is None:
            return op.Transpose(op.Gather(self.weight, ids, axis=1), perm=[1, 2, 0])
        if self.form.dynamic:
            levels = op.Gather(self.weight_quantized, ids, axis=1)  # [D, B, S]
            levels = op.Transpose(op.Cast(levels, to=FLOAT), perm=[1, 2, 0])
            return op.Mul(levels, op.Unsqueeze(op.Gather(self.weight_scales, ids), [-1]))
        packed = op.Gather(self.weight_quantized, ids)  # [B, S, blocks, bytes]
        # No -1 in these shapes: of no ids at all, nothing follows from the others.
        block = self.form.block_size
        blocks = -(-self.inputs // block)
        if self.form.bits == 4:
            packed = op.Reshape(_nibbles(op, packed), [0, 0, blocks, block])
        zero = 1 << (self.form.bits - 1)
        levels = op.Cast(packed, to=self.form.dtype)
        levels = op.Sub(levels, op.CastLike(float(zero), levels))
        scales = op.Unsqueeze(op.Gather(self.weight_scales, ids), [-1])  # [B, S, blocks, 1]
        rows = op.Reshape(op.Mul(levels, scales), [0, 0, blocks * block])
        if self.inputs % block:
            rows = op.Slice(rows, [0], [self.inputs], [2])
        return rows


def _nibbles(op: OpBuilder, packed: ir.Value) -> ir.Value:
    """u8[B, S, blocks, bytes] → u8[B, S, blocks, bytes, 2], the low half of each byte first."""
    low, high = (
        op.BitwiseAnd(packed, op.Constant(value=ir.tensor(np.uint8(15)))),
        op.BitShift(packed, op.Constant(value=ir.tensor(np.uint8(4))), direction="RIGHT"),
    )
    return op.Concat(op.Unsqueeze(low, [-1]), op.Unsqueeze(high, [-1]), axis=-1)


class TiedEmbedding(nn.Module):
    """The embedding of a model whose head holds its matrix. `name` is the model's, as for both."""

    def __init__(self, head: TiedHead, name: str):
        super().__init__(name)
        self.lm_head = head

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        rows = self.lm_head(op, ids, look_up=True)
        return rows if self.lm_head.form.dtype == FLOAT else op.Cast(rows, to=FLOAT)


class TokenDecoder:
    """A decoder with its embedding, which is the head's matrix where the config ties them."""

    def __init__(self, config: DecoderConfig, name: str, precision: Precision):
        self.config, self.dtype = config, precision.decoder.dtype
        self.model = DecoderWithHead(config, name, precision.decoder, precision.head)
        if config.tie_word_embeddings:
            head = TiedHead(config.hidden_size, config.vocab_size, form=precision.head)
            self.model.lm_head = head
            self.embedding: nn.Module = TiedEmbedding(head, name)
        else:
            self.embedding = TokenEmbedding(config, name, precision.embed, 0)

    def embed(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """ids i64[B, S] → f32[B, S, D], by a name under which `verify` finds it in the graph."""
        rows = self.embedding(op, ids)
        rows.name = "inputs_embeds"
        return rows

    def __call__(
        self, op: OpBuilder, x: ir.Value, mask: ir.Value, positions: ir.Value, pasts: list[Past]
    ) -> tuple[ir.Value, list[Past]]:
        """Logits of every row in the decoder's own floats, and the cache."""
        step = Step(op, self.config, x, mask, positions, self.dtype)
        return self.model(op, cast(op, x, self.dtype), step, pasts, op.Constant(value_int=0))

    def add_outputs(
        self,
        builder: GraphBuilder,
        logits: ir.Value,
        presents: list[Past],
        dims: tuple[str, str, str],
    ) -> None:
        """float32 logits, and the cache.

        `dims`: what batch, rows of logits and length of the cache are called.
        """
        config, (batch, rows, length) = self.config, dims
        logits = logits if self.dtype == FLOAT else builder.op.Cast(logits, to=FLOAT)
        add_output(builder, logits, "logits", FLOAT, [batch, rows, config.vocab_size])
        cache = [batch, config.kv_heads, length, config.head_size]
        for i, (key, value) in enumerate(presents):
            add_output(builder, key, f"present.{i}.key", self.dtype, cache)
            add_output(builder, value, f"present.{i}.value", self.dtype, cache)


def prefix_init_graph(config: DecoderConfig, name: str, precision: Precision) -> GraphBuilder:
    """prefix_embeddings f32[B, P, D], input_ids i64[B, S], S ≥ 0 → logits f32[B, P+S, V], cache.

    Positions count from 0 and every row is real.
    """
    builder = new_graph("prefix_init")
    op, decoder = builder.op, TokenDecoder(config, name, precision)
    rows, width = "batch", config.hidden_size
    prefix = builder.input("prefix_embeddings", FLOAT, [rows, "prefix_sequence", width])
    ids = builder.input("input_ids", INT64, [rows, "text_sequence"])
    x = op.Concat(prefix, decoder.embed(op, ids), axis=1)
    shape = op.Shape(x, start=0, end=2)  # [B, P+S]
    mask = op.Expand(op.Constant(value_ints=[1]), shape)
    length = op.Squeeze(op.Shape(x, start=1, end=2), [0])
    positions = op.Expand(op.Range(0, length, 1), shape)
    pasts = empty_pasts(op, x, config, decoder.dtype)
    logits, presents = decoder(op, x, mask, positions, pasts)
    decoder.add_outputs(builder, logits, presents, (rows, "total_sequence", "total_sequence"))
    return builder


def empty_pasts(
    op: OpBuilder, x: ir.Value, config: DecoderConfig, dtype: ir.DataType
) -> list[Past]:
    """Caches of no position yet, [B, K, 0, head_dim], for x [B, …]."""
    sizes = [config.kv_heads], [0], [config.head_size]
    shape = op.Concat(op.Shape(x, start=0, end=1), *sizes, axis=0)
    none = cast(op, op.ConstantOfShape(shape, value=ir.tensor(np.zeros(1, np.float32))), dtype)
    return [(none, none)] * config.num_hidden_layers


def language_model_graph(config: DecoderConfig, name: str, precision: Precision) -> GraphBuilder:
    """input_ids i64[B, S], mask i64[B, P+S], positions i64[B, S], cache → logits, cache."""
    builder = new_graph("language_model")
    op, decoder = builder.op, TokenDecoder(config, name, precision)
    rows, new = "batch_size", "sequence_length"
    ids = builder.input("input_ids", INT64, [rows, new])
    mask = builder.input("attention_mask", INT64, [rows, "total_sequence_length"])
    positions = builder.input("position_ids", INT64, [rows, new])
    dims = [rows, config.kv_heads, "past_sequence_length", config.head_size]
    pasts: list[Past] = []
    for i in range(config.num_hidden_layers):
        key = builder.input(f"past_key_values.{i}.key", decoder.dtype, dims)
        pasts.append((key, builder.input(f"past_key_values.{i}.value", decoder.dtype, dims)))
    x = decoder.embed(op, ids)
    logits, presents = decoder(op, x, mask, positions, pasts)
    decoder.add_outputs(builder, logits, presents, (rows, new, "total_sequence_length"))
    return builder
