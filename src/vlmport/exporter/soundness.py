"""Check that a new bundle can be used: the prompt has a place for the image, float16 suffices.

float16 is checked by running the graph in float32 and looking at the largest values. Running the
float16 graph itself on a CPU proves nothing, because ONNX Runtime computes most of it in float32,
and the overflow would first be seen on a user's GPU.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlmport.bundle import Bundle
from vlmport.errors import ExportError, PromptError, TokenizerError
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.sessions import open_session
from vlmport.runtime.messages import check_messages
from vlmport.runtime.probe import golden_feeds, golden_image
from vlmport.runtime.prompt import Prompter

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
LIMIT = 65504 / 4  # a quarter of the largest float16: another image may give larger values
SUFFIX = "::largest"


def check_prompt(bundle: Bundle) -> None:
    """Prepare a caption prompt of the golden image up to its token ids, from the new files.

    Raises ExportError if the image has no placeholder in it.
    """
    spec = bundle.manifest.prompt
    picture = golden_image(bundle.manifest.golden)
    try:
        chat = check_messages(spec.caption, [picture])
        prompter = Prompter(bundle.folder, spec)
        ids = prompter.ids(chat.messages)
        options = bundle.manifest.golden.options
        processed = Components.open(bundle).process_image(picture, options)
        prompter.splice(ids, [processed.prompt_ids])
    except (PromptError, TokenizerError) as error:
        raise ExportError(
            f"the prompt for a caption has no place for the image: {error}",
            hint=f"does the checkpoint's tokenizer cut {spec.image_placeholder!r} into pieces?",
            code="export.prompt-without-image",
        ) from error


def check_float16(bundle: Bundle, precision: str) -> dict[str, float]:
    """Find component → the largest magnitude of any float16 tensor, on the golden image.

    Raises ExportError naming the tensors beyond LIMIT.
    """
    largest = {}
    for component, feeds in golden_feeds(bundle, precision):
        path = bundle.path(bundle.variant(component, precision).model)
        magnitudes = half_magnitudes(path, feeds)
        beyond = {name: value for name, value in magnitudes.items() if not value <= LIMIT}
        if beyond:
            worst = sorted(beyond, key=beyond.__getitem__, reverse=True)[:4]
            named = ", ".join(f"{name!r} {beyond[name]:.3g}" for name in worst)
            raise ExportError(
                f"{precision}: {component}: {len(beyond)} of {len(magnitudes)} tensors come "
                f"near what float16 holds (limit {LIMIT:.0f}): {named}",
                hint="export this model as fp32, q8 or q4",
                code="export.near-float16-limit",
            )
        largest[component] = max(magnitudes.values(), default=0.0)
    return largest


def half_magnitudes(path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Find the largest magnitude of each tensor that is float16 in a graph, computed in float32.

    Feeds that are no inputs of the graph are left out; cache inputs without feeds are empty.
    """
    model = ir.load(path)
    halves = list(_half_values(model.graph))
    if not halves:
        return {}
    _widen(model.graph)
    for value in halves:
        magnitude = ir.node("Abs", [value])
        peak = ir.node("ReduceMax", [magnitude.outputs[0]], attributes={"keepdims": 0})
        peak.outputs[0].name = f"{_place(value)}{SUFFIX}"
        peak.outputs[0].type, peak.outputs[0].shape = ir.TensorType(FLOAT), ir.Shape([])
        model.graph.extend([magnitude, peak])
        model.graph.outputs.append(peak.outputs[0])
    # By its path: weights past 2 GB, and external data, can't be opened from bytes.
    with tempfile.TemporaryDirectory(prefix=".float32-", dir=path.parent) as wide:
        whole = Path(wide, "model.onnx")
        ir.save(model, whole, external_data="weights", size_threshold_bytes=1024)
        session = open_session(whole, low_memory=True)
    wanted = [one.name for one in session.get_outputs() if one.name.endswith(SUFFIX)]
    inputs = {
        one.name: feeds[one.name] if one.name in feeds else _empty(one.shape)
        for one in session.get_inputs()
    }
    values = session.run(wanted, inputs)
    return {
        name.removesuffix(SUFFIX): float(np.asarray(value))
        for name, value in zip(wanted, values, strict=True)
    }


def _place(value: ir.Value) -> str:
    """Name the node that makes a value, which shows its place in the model."""
    producer = value.producer()
    if producer is None or not producer.name:
        return value.name or ""
    return f"{producer.name}:{value.index()}" if value.index() else producer.name


def _half_values(graph: ir.Graph, half: set[ir.Value] | None = None) -> Iterator[ir.Value]:
    """List values that float16 flows into. Contrib operators state no types, so these are followed.

    `half` are those of the graph that contains this one. Of a branch, only its outputs can be read.
    """
    half = set() if half is None else half
    half |= {value for value in graph.initializers.values() if value.dtype == HALF}
    half |= {value for value in graph.inputs if value.dtype == HALF}
    for node in graph:
        branches = _branches(node)
        for branch in branches:
            deque(_half_values(branch, half), maxlen=0)
        if node.op_type == "Cast":
            is_half = node.attributes["to"].as_int() == HALF
        elif branches:
            is_half = any(value in half for branch in branches for value in branch.outputs)
        else:
            is_half = any(value in half for value in node.inputs if value is not None)
        for value in node.outputs if is_half and node.op_type != "Shape" else ():
            if value.name:
                half.add(value)
                if value.uses():
                    yield value


def _branches(node: ir.Node) -> list[ir.Graph]:
    """List the subgraphs of a node."""
    kinds = node.attributes.values()
    return [one.as_graph() for one in kinds if one.type == ir.AttributeType.GRAPH]


def _widen(whole: ir.Graph) -> None:
    """Make every float16 of a graph and its branches a float32, in place."""
    for graph in (whole, *whole.subgraphs()):
        for value in graph.initializers.values():
            if value.dtype == HALF:
                assert value.const_value is not None
                value.const_value = _widened(value.const_value)
                value.type = ir.TensorType(FLOAT)
        for value in graph.inputs:
            if value.dtype == HALF:
                value.type = ir.TensorType(FLOAT)
    for node in whole.all_nodes():
        if node.op_type == "Cast" and node.attributes["to"].as_int() == HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for value in node.outputs:
            if value.dtype == HALF:
                value.type = ir.TensorType(FLOAT)


def _widened(half: ir.TensorProtocol) -> ir.LazyTensor:
    """Return the values in float32, computed when written; neither form is kept in memory."""

    def make() -> ir.Tensor:
        wide = half.numpy().astype(np.float32)
        if isinstance(half, ir.ExternalTensor):
            half.release()
        return ir.Tensor(wide, name=half.name)

    return ir.LazyTensor(
        make,
        dtype=FLOAT,
        shape=ir.Shape(half.shape.numpy()),
        name=half.name,
    )


def _empty(shape: list[int | str]) -> np.ndarray:
    """Make a cache of one row without any position."""
    sizes = [size if isinstance(size, int) else 0 for size in shape]
    return np.zeros([1, *sizes[1:]], np.float32)
