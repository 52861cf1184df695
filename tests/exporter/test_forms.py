"""Each precision in the forms that it promises, in every family: operators, weights, edges, cache.

That the forms compute what they should is proven elsewhere. Here it is that a graph called `q8`
multiplies bytes at all, which no comparison of numbers would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.checkpoints import write_prefix_checkpoint
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.bundle import ANY, SUFFIXES, Bundle
from vlmport.exporter import export
from vlmport.graph.parameters import SAFE_LEVEL

WRITERS: dict[str, Callable[[Path], Path]] = {
    "prefix": write_prefix_checkpoint,
    "idefics3": write_idefics3_checkpoint,
    "qwen2_5_vl": write_qwen2_5,
    "qwen3_vl": write_qwen3,
}
VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
HALF = ("fp16", "q4f16")


@pytest.fixture(scope="module", params=WRITERS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny model of each family in every precision."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = WRITERS[request.param](folder / "checkpoint")
    return export(checkpoint, folder / "bundle", precisions=tuple(SUFFIXES))


def graph_of(bundle: Bundle, component: str, precision: str) -> onnx.GraphProto:
    return onnx.load(bundle.path(bundle.variant(component, precision).model)).graph


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def products(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, np.ndarray]]:
    """Each product with a matrix of the checkpoint, and that matrix as stored."""
    weights = {tensor.name: tensor for tensor in graph.initializer if "." in tensor.name}
    return [
        (node, numpy_helper.to_array(weights[node.input[1]]))
        for node in nodes_of(graph)
        if node.op_type in PRODUCTS and node.input[1] in weights
    ]


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {one.name: one.i for one in node.attribute}


@pytest.mark.parametrize("precision", SUFFIXES)
def test_files_have_the_hubs_suffix(bundle: Bundle, precision: str) -> None:
    for component, forms in bundle.manifest.components.items():
        if ANY not in forms:
            assert forms[precision].model == f"onnx/{component}{SUFFIXES[precision]}.onnx"


@pytest.mark.parametrize("precision", SUFFIXES)
def test_edges_are_float32_but_for_the_cache(bundle: Bundle, precision: str) -> None:
    cache = bundle.manifest.cache
    seen = set()
    for component in bundle.manifest.components:
        graph = graph_of(bundle, component, precision)
        for port in (*graph.input, *graph.output):
            kind = port.type.tensor_type.elem_type
            if port.name.startswith((cache.past, cache.present)):
                half = precision in HALF
                assert kind == (TensorProto.FLOAT16 if half else TensorProto.FLOAT), port.name
                seen.add("cache")
            elif kind in FLOATS:
                assert kind == TensorProto.FLOAT, (component, port.name)
                seen.add(port.name)
    assert {"cache", "pixel_values", "image_features", "inputs_embeds", "logits"} <= seen


@pytest.mark.parametrize("component", [VISION, DECODER])
def test_q8_multiplies_unsigned_by_signed_bytes(bundle: Bundle, component: str) -> None:
    """Activations by DynamicQuantizeLinear, weights to ±64: what CPUs without VNNI add exactly."""
    graph = graph_of(bundle, component, "q8")
    makers = {name: node for node in nodes_of(graph) for name in node.output}
    found = products(graph)
    assert len(found) == len(products(graph_of(bundle, component, "fp32"))) > 8
    for node, weight in found:
        assert node.op_type == "MatMulInteger", node.name
        rounded, _, zero_point = node.input
        assert makers[rounded].op_type == "DynamicQuantizeLinear"
        assert zero_point == makers[rounded].output[2]
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(int)).max() <= SAFE_LEVEL == 64


@pytest.mark.parametrize("precision", ["q4", "q4f16"])
@pytest.mark.parametrize(("component", "bits"), [(VISION, 8), (DECODER, 4)])
def test_q4_keeps_integers_in_blocks(
    bundle: Bundle, component: str, bits: int, precision: str
) -> None:
    """accuracy_level 4 computes in bytes; at 0, 8-bit weights are fifty times slower."""
    graph = graph_of(bundle, component, precision)
    scales = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = products(graph)
    assert len(found) == len(products(graph_of(bundle, component, "fp32")))
    for node, weight in found:
        assert node.op_type == "MatMulNBits", node.name
        given = attributes(node)
        assert (given["bits"], given["block_size"], given["accuracy_level"]) == (bits, 32, 4)
        assert weight.dtype == np.uint8
        half = precision in HALF
        assert scales[node.input[2]] == (TensorProto.FLOAT16 if half else TensorProto.FLOAT)


@pytest.mark.parametrize("component", [VISION, DECODER])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_floats_are_multiplied_as_they_are_stored(
    bundle: Bundle, component: str, precision: str, dtype: str
) -> None:
    found = products(graph_of(bundle, component, precision))
    assert {(node.op_type, weight.dtype.name) for node, weight in found} == {("MatMul", dtype)}


@pytest.mark.parametrize("precision", SUFFIXES)
def test_the_embedding_is_stored_as_small_as_the_matrices(bundle: Bundle, precision: str) -> None:
    tables = {tensor.name: tensor for tensor in graph_of(bundle, EMBED, precision).initializer}
    (table,) = (
        tensor for name, tensor in tables.items() if "weight" in name and "scales" not in name
    )
    rows, width = table.dims
    dims = bundle.manifest.dims
    assert rows >= dims.vocab_size
    stored = {"fp32": ("FLOAT", 1), "fp16": ("FLOAT16", 1), "q8": ("UINT8", 1)}
    kind, packed = stored.get(precision, ("UINT8", 2))
    assert TensorProto.DataType.Name(table.data_type) == kind
    assert width * packed == dims.hidden_size
