"""Run a written graph on weights that lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vlmport.exporter.assign import Assignment
from vlmport.graph.builder import GraphBuilder, to_model


@dataclass
class InMemory:
    """A LazyTensor of an array, which counts how often it is read."""

    name: str
    array: np.ndarray
    dtype: str = "F32"
    reads: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def numpy(self) -> np.ndarray:
        self.reads.append(self.name)
        return np.array(self.array, np.float32)


def graph_bytes(builder: GraphBuilder, tensors: Mapping[str, np.ndarray]) -> bytes:
    """A graph whose weights are these; every one of them has to be used."""
    assignment = Assignment({name: InMemory(name, array) for name, array in tensors.items()})
    assignment.assign(builder.graph, lambda count: None)
    assignment.finish(lambda key: False)
    return ir.to_proto(to_model(builder)).SerializeToString()


def open_graph(builder: GraphBuilder, tensors: Mapping[str, np.ndarray]) -> ort.InferenceSession:
    """A session of it."""
    data = graph_bytes(builder, tensors)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
