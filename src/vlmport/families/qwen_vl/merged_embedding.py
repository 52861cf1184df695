"""The embedding for a client that needs image features written into it by the graph.

Source of the inputs and outputs: onnxruntime-genai's model `embedding`.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmport.graph.builder import GraphBuilder, add_output, new_graph
from vlmport.graph.decoder import TokenEmbedding, with_lanes
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.parameters import Format
from vlmport.graph.refusal import refuse

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def merged_embedding_graph(
    config: DecoderConfig, name: str, form: Format, image_token_id: int
) -> GraphBuilder:
    """input_ids i64[B, S], image_features f32[T, D·(1+n)] → inputs_embeds f32[B, S, D·(1+n)].

    The features replace, in order, the rows whose id is the image token's, in all rows of the
    batch, one after another. T is 0 for text.
    """
    builder = new_graph("embedding")
    op, dims, width = builder.op, ["batch_size", "sequence_length"], config.embeds_size
    ids = builder.input("input_ids", INT64, dims)
    features = builder.input("image_features", FLOAT, ["num_features", width])
    words = with_lanes(op, TokenEmbedding(config, name, form, 0)(op, ids), config)

    is_image = op.Equal(ids, image_token_id)
    flat = op.Reshape(op.Cast(is_image, to=INT64), [-1])
    rows = op.Shape(features, start=0, end=1)
    features = refuse(
        op,
        features,
        op.Not(op.Equal(op.ReduceSum(flat, keepdims=1), rows)),
        "as many rows of image_features are needed as input_ids has image tokens",
        "pass the features of all pictures whose tokens are in input_ids, and of no others",
    )
    # The row of features for each token; the row of zeros after them for other tokens.
    number = op.Sub(op.CumSum(flat, op.Constant(value_int=0)), 1)
    number = op.Where(is_image, op.Reshape(number, op.Shape(ids)), rows)
    own = op.Gather(op.Pad(features, [0, 0, 1, 0]), number)
    embeds = op.Where(op.Unsqueeze(is_image, [-1]), own, words)
    add_output(builder, embeds, "inputs_embeds", FLOAT, [*dims, width])
    return builder
