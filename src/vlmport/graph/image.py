"""What image processors share beside resizing: the input, rescaling and normalising."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from vlmport.graph.builder import GraphBuilder, OpBuilder


def image_input(builder: GraphBuilder) -> ir.Value:
    """The input `image`, uint8 [height, width, 3], RGB."""
    return builder.input("image", ir.DataType.UINT8, ["height", "width", 3])


def rescale_and_normalize(
    op: OpBuilder, pixels: ir.Value, scale: float, mean: Sequence[float], std: Sequence[float]
) -> ir.Value:
    """uint8 [H, W, 3] → float32 [1, 3, H, W], (pixel · scale - mean) / std."""
    values = op.Cast(op.Transpose(pixels, perm=[2, 0, 1]), to=ir.DataType.FLOAT)
    shape = (3, 1, 1)
    mean_value = op.initializer(ir.tensor(np.float32(mean).reshape(shape), name="image_mean"))
    std_value = op.initializer(ir.tensor(np.float32(std).reshape(shape), name="image_std"))
    normal = op.Div(op.Sub(op.Mul(values, float(scale)), mean_value), std_value)
    return op.Unsqueeze(normal, [0])
