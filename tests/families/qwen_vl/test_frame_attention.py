"""Attention within frames equals each frame's alone, be they of one size or of several."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.running import open_graph
from vlmport.families.qwen_vl import frame_attention
from vlmport.families.qwen_vl.frame_attention import FrameAttention
from vlmport.graph.builder import add_output, new_graph

HEADS, WIDTH = 3, 24
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def make() -> ort.InferenceSession:
    builder = new_graph("frames")
    op = builder.op
    q, k, v = (builder.input(name, FLOAT, [1, "num_patches", WIDTH]) for name in "qkv")
    frames = FrameAttention.over(op, builder.input("sizes", INT64, ["frames"]), HEADS)
    y = frames.attend(op, q, k, v)
    y = frames.attend(op, y, k, v)  # a second layer: its names must not be those of the first
    add_output(builder, y, "y", FLOAT, [1, "num_patches", WIDTH])
    return open_graph(builder, {})


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return make()


def run(session: ort.InferenceSession, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The graph's result and torch's, frame by frame."""
    rng = np.random.default_rng(len(sizes))
    q, k, v = rng.standard_normal((3, 1, sum(sizes), WIDTH), np.float32)
    (y,) = session.run(["y"], {"q": q, "k": k, "v": v, "sizes": np.array(sizes)})
    truth, start = [], 0
    for size in sizes:
        end = start + size
        heads = [
            torch.from_numpy(x[:, start:end]).reshape(1, size, HEADS, -1).transpose(1, 2)
            for x in (q, k, v)
        ]
        for _ in range(2):
            heads[0] = torch.nn.functional.scaled_dot_product_attention(*heads)
        truth.append(heads[0].transpose(1, 2).reshape(1, size, WIDTH))
        start = end
    return np.asarray(y), torch.cat(truth, dim=1).numpy()


ANY = st.lists(st.integers(1, 40), min_size=1, max_size=5)
EVEN = st.builds(lambda size, count: [size] * count, st.integers(1, 40), st.integers(1, 5))


@settings(deadline=None)
@given(ANY | EVEN)
def test_frames_do_not_see_each_other(session: ort.InferenceSession, sizes: list[int]) -> None:
    y, truth = run(session, sizes)
    np.testing.assert_allclose(y, truth, atol=2e-6)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every frame begins with the first patch, those of one size are right still."""
    monkeypatch.setattr(frame_attention, "starts_of", lambda op, sizes: op.Sub(sizes, sizes))
    session = make()
    y, truth = run(session, [7, 7])
    np.testing.assert_allclose(y, truth, atol=2e-6)
    y, truth = run(session, [7, 9])
    assert np.abs(y - truth).max() > 1e-3
