"""The prefix captioner as distilvit2's own four files.

Source: the export of tarekziade/distilvit2, whose file, input and output names these are, and
optimum's for the two files that it leaves to that.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.families.base import HubFiles, Layout, without_sampling
from vlmport.families.prefix.siglip_head import PoolingHead
from vlmport.graph.builder import GraphBuilder, add_output, new_graph, to_float32
from vlmport.graph.parameters import Format, Weight
from vlmport.graph.prefix_decoder import language_model_graph, prefix_init_graph
from vlmport.graph.siglip import SiglipVisionTower

if TYPE_CHECKING:
    from vlmport.families.prefix.family import PrefixCaptioner

FLOAT = ir.DataType.FLOAT
LANGUAGE_MODEL = "language_model"
HEAD = "vision_encoder.head"


def four_files(family: PrefixCaptioner) -> Layout:
    """The layout `components`; the decoder's weights are stored once, for both of its graphs."""
    return Layout(
        fixed_graphs=lambda: {"image_processor": family.image_processor(with_prompt=False)},
        graphs=lambda precision: {
            "vision_encoder": _vision_encoder(family, precision.vision),
            "projection": _projection(family, precision.vision),
            "language_model": language_model_graph(family.text, LANGUAGE_MODEL, precision),
            "prefix_init": prefix_init_graph(family.text, LANGUAGE_MODEL, precision),
        },
        hub_files=lambda: _own_files(family),
        paths={
            "image_processor": "image_processor.onnx",
            "vision_encoder": "vision_encoder/model{suffix}.onnx",
            "projection": "projection{suffix}.onnx",
            "language_model": "language_model/model{suffix}.onnx",
            "prefix_init": "prefix_init{suffix}.onnx",
        },
        shared={"prefix_init": "language_model"},
    )


def _vision_encoder(family: PrefixCaptioner, form: Format) -> GraphBuilder:
    """pixel_values f32[B, 3, size, size] → last_hidden_state f32[B, N, D], pooler_output f32[B, D].

    Without the second where the checkpoint has no pooling head.
    """
    vision = family.vision
    builder = new_graph("vision_encoder")
    op, size, width = builder.op, vision.image_size, vision.hidden_size
    pixels = builder.input("pixel_values", FLOAT, ["batch_size", 3, size, size])
    patches = SiglipVisionTower(vision, form, "vision_encoder")(op, pixels)
    dims = ["batch_size", vision.num_patches, width]
    add_output(builder, to_float32(op, patches, form.dtype), "last_hidden_state", FLOAT, dims)
    if vision.vision_use_head:
        pooled = PoolingHead(vision, pooler_form(form), HEAD)(op, patches)
        dims = ["batch_size", width]
        add_output(builder, to_float32(op, pooled, form.dtype), "pooler_output", FLOAT, dims)
    if form.dynamic:
        _halve_vectors(builder.graph)
    return builder


def _halve_vectors(graph: ir.Graph) -> None:
    """Keep biases and norms in float16, computed with in float32 as before.

    For the size: distilvit2 promises 226 MB. 8-bit matrices are a hundred times less exact.
    """
    for name, value in list(graph.initializers.items()):
        if not isinstance(value, Weight) or value.alias or len(value.shape or ()) != 1:
            continue  # matrices, and the scales of matrices
        cast = ir.node("Cast", [value], attributes={"to": int(FLOAT)}, name=f"{name}/Cast")
        for node, place in list(value.uses()):
            if node is not cast:
                node.replace_input_with(place, cast.outputs[0])
        cast.outputs[0].name = f"{name}/float32"
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        graph.insert_before(graph[0], cast)


def pooler_form(form: Format) -> Format:
    """4 bits, in long blocks, where the tower has integers: no caption reads the pooled vector."""
    return form if form.bits is None else Format(bits=4, block_size=256, dtype=form.dtype)


def _projection(family: PrefixCaptioner, form: Format) -> GraphBuilder:
    """vision_hidden_states f32[B, N, vision width] → projected_prefix f32[B, N, D]."""
    builder = new_graph("projection")
    op, dims = builder.op, ["batch", "sequence"]
    hidden = builder.input("vision_hidden_states", FLOAT, [*dims, family.vision.hidden_size])
    if form.dtype != FLOAT:
        hidden = op.Cast(hidden, to=form.dtype)
    prefix = to_float32(op, family.project(op, hidden, form), form.dtype)
    add_output(builder, prefix, "projected_prefix", FLOAT, [*dims, family.text.hidden_size])
    return builder


def _own_files(family: PrefixCaptioner) -> HubFiles:
    """distilvit2's own: its config, whose LoRA is merged, and its tokenizer as it is."""
    hub = family.hub_files()
    return dataclasses.replace(
        hub,
        config={
            "architectures": ["PrefixConditioningVLM"],
            "model_type": family.model_types[0],
            "projection_type": family.config.projection_type,
            "mlp_hidden_dim": family.config.mlp_hidden_dim,
            "max_length": family.config.max_length,
            "vision_config": dict(family.raw_vision),
            "text_config": without_sampling(family.raw_text),
        },
        preprocessor_config={**hub.preprocessor_config, "processor_class": "SiglipProcessor"},
        processor_config=None,
        chat_template=None,
        new_tokens=(),
    )
