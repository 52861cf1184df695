"""Cut the embedding out of a graph that takes token ids, and run it alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx.external_data_helper
import onnxruntime as ort

from vlmport.errors import BundleError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IDS, EMBEDS = "input_ids", "inputs_embeds"
PIECE = 4096  # ids at a time


def look_up(path: Path, ids: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S D"]:
    """Embed ids with the part of the graph that leads from input_ids to the value `inputs_embeds`.

    Raises BundleError where there is no such part.
    """
    model = onnx.load(path, load_external_data=False)
    _cut(model.graph, path)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    session = ort.InferenceSession(model.SerializeToString())
    pieces = [ids[at : at + PIECE] for at in range(0, len(ids), PIECE)]
    found = [session.run([EMBEDS], {IDS: one[None]})[0] for one in pieces]
    return np.concatenate([np.asarray(one) for one in found], axis=1)[0]


def _cut(graph: onnx.GraphProto, path: Path) -> None:
    """Keep only the nodes and weights that EMBEDS is made of, in place."""
    wanted, nodes = {EMBEDS}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    inputs = [one for one in graph.input if one.name in wanted]
    if [one.name for one in inputs] != [IDS]:
        raise BundleError(
            f"{path}: no value {EMBEDS!r} that is made of {IDS!r} alone",
            hint="export the bundle again",
            code="bundle.wrong-graph",
        )
    initializers = [one for one in graph.initializer if one.name in wanted]
    embeds = onnx.helper.make_tensor_value_info(EMBEDS, onnx.TensorProto.FLOAT, None)
    kept = onnx.helper.make_graph(nodes[::-1], "embedding", inputs, [embeds], initializers)
    graph.CopyFrom(kept)
