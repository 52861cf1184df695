"""A decoder that reads a whole sequence with images at once, and gives logits of every row.

It has no inputs for a cache or positions: with images of one fixed size, M-RoPE's positions follow
from the ids. Source of the inputs and outputs: CodeGandee/auto-quantize-model, whose decoder is
used to find out which layers tolerate rounding; its positions were those of a text.

B batch, S tokens, D hidden, n lanes, V vocabulary.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from vlmport.graph.builder import GraphBuilder, OpBuilder, add_output, new_graph
from vlmport.graph.decoder import with_lanes
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.mrope import mrope_positions
from vlmport.graph.precision import Precision
from vlmport.graph.prefix_decoder import TokenDecoder, empty_pasts
from vlmport.graph.refusal import refuse

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL

NAME = "text_with_image"
Grid = tuple[int, int]  # rows and columns of patches


def text_with_image_graph(
    config: DecoderConfig,
    name: str,
    precision: Precision,
    image_token_id: int,
    grid: Grid,
    merge: int,
) -> GraphBuilder:
    """input_ids i64[B, S], attention_mask i64[B, S], image_embeds [B, S, D·(1+n)] → logits
    [B, S, V]; both floats are float16 where the decoder computes in it.

    A row of image_embeds counts where its id is the image token's, and nowhere else.
    """
    builder = new_graph(NAME)
    op, decoder = builder.op, TokenDecoder(config, name, precision)
    dtype, dims = decoder.dtype, ["batch_size", "sequence_length"]
    ids = builder.input("input_ids", INT64, dims)
    mask = builder.input("attention_mask", INT64, dims)
    image = builder.input("image_embeds", dtype, [*dims, config.embeds_size])

    is_image = op.And(op.Equal(ids, image_token_id), op.Cast(mask, to=BOOL))
    grids = _grids(op, is_image, grid, merge)
    positions, _ = mrope_positions(op, ids, mask, grids, image_token_id, merge)
    words = with_lanes(op, decoder.embed(op, ids), config)
    words = op.CastLike(words, image)
    x = op.Where(op.Unsqueeze(is_image, [-1]), image, words)
    pasts = empty_pasts(op, ids, config, dtype)
    logits, _ = decoder(op, x, mask, positions, pasts)
    add_output(builder, logits, "logits", dtype, [*dims, config.vocab_size])
    return builder


def _grids(op: OpBuilder, is_image: ir.Value, grid: Grid, merge: int) -> ir.Value:
    """Write image_grid_thw i64[I, 3] of all images of the batch, which have one size."""
    tokens = math.prod(grid) // merge**2
    count = op.ReduceSum(op.Cast(op.Reshape(is_image, [-1]), to=INT64), keepdims=1)  # [1]
    count = refuse(
        op,
        count,
        op.Cast(op.Mod(count, tokens), to=BOOL),
        f"input_ids: the image tokens are not a multiple of {tokens}",
        f"a picture of this graph's size takes {tokens} of them, one after another",
    )
    shape = op.Concat(op.Div(count, tokens), [3], axis=0)
    return op.Expand(op.Constant(value_ints=[1, *grid]), shape)
