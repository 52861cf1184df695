"""The toy's decoder as a graph: two layers of attention (by the operator that bundles use) and a
tanh MLP. toy.py computes the same in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from vlmport.bundle import CacheLayout

VOCAB = 113
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 4, 2, 8, 24
THETA = 10000.0
CACHE = CacheLayout("old.", "new.")


def decoder(
    weights: Mapping[str, np.ndarray], positions_rank: int = 2, cache_dtype: int = T.FLOAT
) -> onnx.ModelProto:
    """Two layers of attention (in the type of the cache) and a tanh MLP."""
    nodes = [
        *_lengths(),
        *(
            [h.make_node("Gather", ["position_ids", "one0"], ["positions"], axis=0)]
            * (positions_rank == 3)
        ),
        h.make_node(
            "Cast", ["position_ids" if positions_rank == 2 else "positions"], ["pf"], to=T.FLOAT
        ),
        h.make_node("Unsqueeze", ["pf", "last_axis"], ["pu"]),
        h.make_node("Mul", ["pu", "frequencies"], ["angle"]),
        h.make_node("Cos", ["angle"], ["cos"]),
        h.make_node("Sin", ["angle"], ["sin"]),
    ]
    x = "inputs_embeds"
    for i in range(LAYERS):
        layer, x = _layer(i, x, cache_dtype)
        nodes += layer
    nodes += [
        h.make_node("Neg", ["num_logits_to_keep"], ["minus"]),
        h.make_node("Reshape", ["minus", "one1"], ["start"]),
        h.make_node("Slice", [x, "start", "far", "one1"], ["kept"]),
        h.make_node("MatMul", ["kept", "head"], ["logits"]),
    ]
    B, S = "batch_size", "sequence_length"
    positions = [B, S] if positions_rank == 2 else [3, B, S]
    ports = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("k", "v")]
    cache = [B, KV_HEADS, "past_sequence_length", HEAD_DIM]
    inputs = [value(f"{CACHE.past}{port}", cache_dtype, cache) for port in reversed(ports)]
    inputs += [
        value("inputs_embeds", T.FLOAT, [B, S, HIDDEN]),
        value("attention_mask", T.INT64, [B, "total_sequence_length"]),
        value("position_ids", T.INT64, positions),
        value("num_logits_to_keep", T.INT64, []),
    ]
    cache = [B, KV_HEADS, "total_sequence_length", HEAD_DIM]
    outputs = [value(f"{CACHE.present}{port}", cache_dtype, cache) for port in ports]
    outputs.append(value("logits", T.FLOAT, [B, "num_logits", VOCAB]))
    names = ("q", "k", "v", "o", "up", "down")
    constants = {f"{n}{i}": weights[f"{n}{i}"] for i in range(LAYERS) for n in names}
    constants |= {
        "head": weights["head"],
        "frequencies": (THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype("f4"),
        "last_axis": np.array([2]),
        "one0": np.array(0),
        "one1": np.array([1]),
        "scalar0": np.array(0),
        "scalar1": np.array(1),
        "first_axis": np.array([0]),
        "far": np.array([2**62]),
    }
    return model(nodes, inputs, outputs, constants)


def _lengths() -> list[onnx.NodeProto]:
    """seqlens_k from the last 1 of the mask, total from its length."""
    return [
        h.make_node("Shape", ["attention_mask"], ["length"], start=1, end=2),
        h.make_node("Squeeze", ["length", "first_axis"], ["length0"]),
        h.make_node("Cast", ["length0"], ["total"], to=T.INT32),
        h.make_node("Range", ["scalar0", "length0", "scalar1"], ["range"]),
        h.make_node("Add", ["range", "scalar1"], ["counts"]),
        h.make_node("Mul", ["attention_mask", "counts"], ["marked"]),
        h.make_node("ReduceMax", ["marked", "one1"], ["last"], keepdims=0),
        h.make_node("Sub", ["last", "scalar1"], ["index"]),
        h.make_node("Cast", ["index"], ["seqlens"], to=T.INT32),
    ]


def _layer(i: int, x: str, dtype: int) -> tuple[list[onnx.NodeProto], str]:
    nodes = []
    for name in ("q", "k", "v"):
        nodes.append(h.make_node("MatMul", [x, f"{name}{i}"], [f"{name}m{i}"]))
        source = f"{name}m{i}"
        if name != "v":
            heads = HEADS if name == "q" else KV_HEADS
            rotated = f"{name}r{i}"
            nodes.append(
                h.make_node("RotaryEmbedding", [source, "cos", "sin"], [rotated], num_heads=heads)
            )
            source = rotated
        nodes.append(h.make_node("Cast", [source], [f"{name}c{i}"], to=dtype))
    past = [f"{CACHE.past}{i}.k", f"{CACHE.past}{i}.v"]
    present = [f"{CACHE.present}{i}.k", f"{CACHE.present}{i}.v"]
    nodes += [
        h.make_node(
            "GroupQueryAttention",
            [f"qc{i}", f"kc{i}", f"vc{i}", *past, "seqlens", "total"],
            [f"a{i}", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
        h.make_node("Cast", [f"a{i}"], [f"af{i}"], to=T.FLOAT),
        h.make_node("MatMul", [f"af{i}", f"o{i}"], [f"ao{i}"]),
        h.make_node("Add", [x, f"ao{i}"], [f"y{i}"]),
        h.make_node("MatMul", [f"y{i}", f"up{i}"], [f"u{i}"]),
        h.make_node("Tanh", [f"u{i}"], [f"t{i}"]),
        h.make_node("MatMul", [f"t{i}", f"down{i}"], [f"d{i}"]),
        h.make_node("Add", [f"y{i}", f"d{i}"], [f"x{i}"]),
    ]
    return nodes, f"x{i}"


def value(name: str, dtype: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, dtype, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, np.ndarray],
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = h.make_graph(list(nodes), "toy", list(inputs), list(outputs), initializers)
    opsets = [h.make_opsetid("", 23), h.make_opsetid("com.microsoft", 1)]
    return h.make_model(graph, opset_imports=opsets, ir_version=10)
