"""The one module that touches onnxscript's private graph builder.

Graphs are written, not traced: modules of `onnxscript.nn` are called with `op`, the operator
dispatcher of a `GraphBuilder`. Legend of dimensions, used in every comment on a shape:
B batch, S new tokens, P past tokens, T image tokens, D hidden, H heads, K key-value heads,
N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript._internal import builder
from onnxscript._internal.builder import OpBuilder
from onnxscript._internal.param_manipulation import separate_input_attributes_from_arguments

__all__ = [
    "MICROSOFT",
    "OPSET",
    "GraphBuilder",
    "OpBuilder",
    "add_output",
    "new_graph",
    "to_float32",
    "to_model",
]

OPSET = 23  # RotaryEmbedding and RMSNormalization; WebGPU keeps every operator we use at 23
IR_VERSION = 10
MICROSOFT = "com.microsoft"

Dims = Sequence[int | str]


class GraphBuilder(builder.GraphBuilder):
    """A builder that reads the signature of each operator once, not for every node.

    Reading them took a seventh of the processor time of an export.
    """

    def _partition_inputs_attributes(
        self, schema: onnx.defs.OpSchema | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        if schema is None:
            return args, kwargs
        key = (schema.domain, schema.name, schema.since_version)
        if key not in _signatures:
            _signatures[key] = ir.schemas.OpSignature.from_op_schema(schema)
        # The arguments are those of the method that this one replaces.
        return separate_input_attributes_from_arguments(
            _signatures[key], list(args), kwargs, fill_defaults=False, allow_extra_args=False
        )


_signatures: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}


def new_graph(name: str) -> GraphBuilder:
    """Make an empty graph that may use the standard operators and ONNX Runtime's own."""
    imports = {"": OPSET, MICROSOFT: 1}
    return GraphBuilder(ir.Graph([], [], nodes=[], opset_imports=imports, name=name))


def add_output(
    builder: GraphBuilder, value: ir.Value, name: str, dtype: ir.DataType, dims: Dims
) -> None:
    """Declare an output. Contrib operators infer no type, so type and dims are always stated."""
    if value.is_graph_input() or value.is_graph_output():
        value = builder.op.Identity(value)
    builder.add_output(value, name)
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(dims)


def to_float32(op: OpBuilder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Cast a value of `dtype` to float32, the type of all floats at the edges of a graph."""
    return value if dtype == ir.DataType.FLOAT else op.Cast(value, to=ir.DataType.FLOAT)


def to_model(builder: GraphBuilder, version: str = "") -> ir.Model:
    """Finish the model, and remove data that would be half of the file.

    These are the builder's notes on every node, and the place in the model of every value between
    two nodes, which the name of its node has too.
    """
    for number, node in enumerate(builder.graph.all_nodes()):
        node.metadata_props.clear()
        for place, value in enumerate(node.outputs):
            if value.name and value.name.startswith("v_") and not value.is_graph_output():
                value.name = f"{number}.{place}" if place else str(number)
                value.type = value.shape = None
    return ir.Model(
        builder.graph,
        ir_version=IR_VERSION,
        producer_name="vlmport",
        producer_version=version,
    )
