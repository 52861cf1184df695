"""Blocks of integers: how exact they are, and that the kernels read them as they were written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnxscript import nn

from tests.errors import raises
from tests.graph.running import InMemory, open_graph
from vlmport.errors import WeightError
from vlmport.exporter.assign import Assignment
from vlmport.graph.builder import GraphBuilder, add_output, new_graph, to_model
from vlmport.graph.layers import Embedding, Linear
from vlmport.graph.parameters import (
    FLOAT16,
    FLOAT32,
    INT4,
    INT4_FLOAT16,
    INT8,
    SAFE_LEVEL,
    W8A8,
    Format,
    Quantizer,
    Weight,
    append_rows,
    quantize_blocks,
    quantize_columns,
)

FORMS = pytest.mark.parametrize("form", [INT4, INT8], ids=["int4", "int8"])
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64

SMALLEST = np.finfo(np.float32).tiny
matrices = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    elements=st.floats(-1000, 1000, width=32),
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def dequantize_blocks(
    quantized: np.ndarray, scales: np.ndarray, form: Format, columns: int
) -> np.ndarray:
    """Compute the matrix that the kernels see: the inverse of `quantize_blocks` up to rounding."""
    assert form.bits in (4, 8)
    if form.bits == 4:
        quantized = np.stack([quantized & 15, quantized >> 4], axis=-1)
    levels = quantized.reshape(*scales.shape, form.block_size).astype(np.float32)
    matrix = (levels - (1 << (form.bits - 1))) * scales[:, :, None]
    return matrix.reshape(len(scales), -1)[:, :columns]


def round_trip(matrix: np.ndarray, form: Format) -> np.ndarray:
    return dequantize_blocks(*quantize_blocks(matrix, form), form, matrix.shape[1])


@FORMS
@given(matrix=matrices)
@settings(max_examples=60, deadline=None)
def test_no_value_is_off_by_more_than_a_step(form: Format, matrix: np.ndarray) -> None:
    """Half a step by rounding; a whole one where the top level, which is missing, was meant."""
    quantized, scales = quantize_blocks(matrix, form)
    blocks = -(-matrix.shape[1] // form.block_size)
    assert quantized.shape == (len(matrix), blocks, form.block_size * form.bits // 8)
    assert (quantized.dtype, scales.dtype) == (np.uint8, np.float32)
    assert scales.shape == (len(matrix), blocks)
    step = np.repeat(np.abs(scales), form.block_size, axis=1)[:, : matrix.shape[1]]
    error = np.abs(dequantize_blocks(quantized, scales, form, matrix.shape[1]) - matrix)
    levels = 1 << (form.bits - 1)
    clipped = np.abs(matrix) > step * (levels - 0.5)
    bound = np.where(clipped, step, step / 2)
    assert (error <= bound * (1 + 1e-4) + SMALLEST * levels).all()


@FORMS
@given(matrix=matrices)
@settings(max_examples=30, deadline=None)
def test_the_farthest_value_of_a_block_is_exact(form: Format, matrix: np.ndarray) -> None:
    read = round_trip(matrix, form)
    for start in range(0, matrix.shape[1], form.block_size):
        block, back = (m[:, start : start + form.block_size] for m in (matrix, read))
        # Of two values equally far, one on each side of zero, the negative one is exact.
        farthest, kept = np.abs(block).max(axis=1), np.abs(back).max(axis=1)
        np.testing.assert_allclose(kept, farthest, rtol=1e-6, atol=1e-36)


@FORMS
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.1, -3e-30, 1e30])
@pytest.mark.parametrize("columns", [1, 31, 32, 33])
def test_constants_come_back(form: Format, value: float, columns: int) -> None:
    matrix = np.full((2, columns), value, np.float32)
    np.testing.assert_allclose(round_trip(matrix, form), matrix, rtol=1e-6)


@FORMS
def test_blocks_of_next_to_nothing_become_zeros(form: Format) -> None:
    matrix = np.float32([[1e-40, 0, -1e-42, 1e-45] * 8])
    assert not round_trip(matrix, form).any()


@FORMS
def test_a_sign_is_not_lost(form: Format) -> None:
    matrix = np.float32([[3, -3, 1, -1] * 8, [-3, 3, -1, 1] * 8])
    read = round_trip(matrix, form)
    assert (np.sign(read) == np.sign(matrix)).all()


def test_error_of_normal_weights_is_what_the_bits_promise() -> None:
    matrix = normal(64, 256)
    errors = [np.sqrt(np.mean((round_trip(matrix, form) - matrix) ** 2)) for form in (INT4, INT8)]
    assert errors[0] < 0.09  # a fourteenth of the spread: what q4_0 is known for
    assert errors[1] < 0.006


def test_the_layout_is_low_nibble_first_around_eight() -> None:
    matrix = np.zeros((1, 32), np.float32)
    matrix[0, :3] = (-8, 7, 1)
    quantized, scales = quantize_blocks(matrix, INT4)
    assert scales.tolist() == [[1.0]]
    assert quantized[0, 0, :2].tolist() == [0 | 15 << 4, 9 | 8 << 4]
    assert quantize_blocks(matrix * 16, INT8)[0][0, 0, :4].tolist() == [0, 240, 144, 128]


@given(matrix=matrices)
@settings(max_examples=40, deadline=None)
def test_columns_are_off_by_half_a_step_and_never_past_the_safe_level(matrix: np.ndarray) -> None:
    quantized, scales = quantize_columns(matrix)
    assert (quantized.shape, quantized.dtype) == (matrix.T.shape, np.int8)
    assert np.abs(quantized.astype(int)).max() <= SAFE_LEVEL
    error = np.abs(quantized.T * scales[:, None] - matrix)
    assert (error <= scales[:, None] / 2 * (1 + 1e-4) + SMALLEST).all()


def test_pairs_of_products_stay_within_sixteen_bits() -> None:
    """What x86 without VNNI adds: two products of an unsigned and a signed byte."""
    assert np.iinfo(np.int16).max >= 2 * 255 * SAFE_LEVEL


def test_float16_scales_are_the_ones_that_levels_were_chosen_with() -> None:
    matrix = normal(16, 64)
    quantized, scales = quantize_blocks(matrix, INT4_FLOAT16)
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    back = dequantize_blocks(quantized, scales, INT4_FLOAT16, 64)
    step = np.repeat(np.abs(scales), 32, axis=1)
    assert (np.abs(back - matrix) <= step * 1.01).all()


def test_w8a8_multiplies_what_was_rounded() -> None:
    matrix, bias, x = normal(24, 64), normal(24, seed=1), normal(5, 64, seed=2)
    session = open_graph(linear_graph(64, 24, W8A8, bias=True), {"weight": matrix, "bias": bias})
    (y,) = session.run(None, {"x": x})
    quantized, scales = quantize_columns(matrix)
    rounded = quantized.T * scales[:, None]
    activation_step = (x.max() - x.min()) / 255
    slack = activation_step * np.abs(rounded).sum(axis=1)  # every activation half a step off, twice
    assert (np.abs(y - (x @ rounded.T + bias)) <= slack).all()
    cosine = (y - bias).ravel() @ (x @ matrix.T).ravel()
    assert cosine / np.linalg.norm(y - bias) / np.linalg.norm(x @ matrix.T) > 0.999


def test_float16_layers_compute_in_float16() -> None:
    matrix, x = normal(24, 64), normal(5, 64, seed=2)
    builder = new_graph("linear")
    half = builder.op.Cast(builder.input("x", FLOAT, ["rows", 64]), to=FLOAT16.dtype)
    y = Linear(64, 24, form=FLOAT16)(builder.op, half)
    add_output(builder, builder.op.Cast(y, to=FLOAT), "y", FLOAT, ["rows", 24])
    (y,) = open_graph(builder, {"weight": matrix}).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ matrix.T, atol=0.03)
    assert np.abs(y - x @ matrix.T).max() > 1e-5


def linear_graph(inputs: int, outputs: int, form: Format, *, bias: bool = False) -> GraphBuilder:
    builder = new_graph("linear")
    x = builder.input("x", FLOAT, ["rows", inputs])
    y = Linear(inputs, outputs, bias=bias, form=form)(builder.op, x)
    add_output(builder, y, "y", FLOAT, ["rows", outputs])
    return builder


@pytest.mark.parametrize("inputs", [32, 48, 70, 8])
@pytest.mark.parametrize("form", [FLOAT32, INT4, INT8], ids=["fp32", "int4", "int8"])
def test_matmul_reads_what_was_written(form: Format, inputs: int) -> None:
    """One-hot rows give the matrix itself: 8-bit activations are exact for them."""
    matrix, bias = normal(10, inputs), normal(10, seed=1)
    session = open_graph(
        linear_graph(inputs, 10, form, bias=True), {"weight": matrix, "bias": bias}
    )
    (y,) = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})
    expected = matrix if form.bits is None else round_trip(matrix, form)
    np.testing.assert_allclose(y, expected.T + bias, atol=2e-6)


@pytest.mark.parametrize("width", [64, 48, 70, 8])
@pytest.mark.parametrize("form", [FLOAT32, INT4, INT8], ids=["fp32", "int4", "int8"])
def test_gather_reads_what_was_written(form: Format, width: int) -> None:
    table = normal(9, width)
    builder = new_graph("embedding")
    ids = builder.input("ids", INT64, ["rows", "columns"])
    rows = Embedding(9, width, extra_rows=2, form=form)(builder.op, ids)
    add_output(builder, rows, "rows", FLOAT, ["rows", "columns", width])
    session = open_graph(builder, {"weight": table})
    (y,) = session.run(None, {"ids": np.int64([[8, 0], [10, 9]])})
    expected = append_rows(table, 2)
    expected = expected if form.bits is None else round_trip(expected, form)
    np.testing.assert_array_equal(y, expected[[[8, 0], [10, 9]]])
    assert not y[1].any()
    (none,) = session.run(None, {"ids": np.zeros((1, 0), np.int64)})
    assert none.shape == (1, 0, width)


def test_an_8_bit_embedding_needs_no_operator_that_a_build_may_lack() -> None:
    """WebAssembly kernels for GatherBlockQuantized are not in every build of ONNX Runtime."""
    builder = new_graph("embedding")
    ids = builder.input("ids", INT64, ["rows", "columns"])
    add_output(
        builder,
        Embedding(9, 64, form=INT8)(builder.op, ids),
        "rows",
        FLOAT,
        ["rows", "columns", 64],
    )
    assert {node.domain for node in to_model(builder).graph} == {""}


@FORMS
def test_a_matrix_is_read_once_and_one_is_held(form: Format) -> None:
    """Whatever the order in which the initializers are written, and again when written twice."""
    matrix = InMemory("weight", normal(4, 64))
    quantizer = Quantizer(lambda weight: quantize_blocks(weight, form))
    for _ in range(2):
        scales = quantizer.scales(matrix.numpy)
        assert len(quantizer._pending) == 1
        quantized = quantizer.quantized(matrix.numpy)
        assert quantizer._pending == {}
        assert matrix.reads == ["weight"]
        matrix.reads.clear()
        np.testing.assert_array_equal(quantized, quantize_blocks(matrix.array, form)[0])
        np.testing.assert_array_equal(scales, quantize_blocks(matrix.array, form)[1])


def test_a_saved_graph_reads_each_matrix_once() -> None:
    builder = linear_graph(64, 8, INT4)
    tensor = InMemory("weight", normal(8, 64))
    assignment, written = Assignment({"weight": tensor}), []
    assignment.assign(builder.graph, written.append)
    assert tensor.reads == []
    for value in builder.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()
    assert tensor.reads == ["weight"]
    assert sorted(written) == [8 * 2 * 4, 8 * 32]


def test_values_that_are_not_finite_are_named() -> None:
    tensor = InMemory("stored.weight", np.full((8, 64), np.nan, np.float32))
    builder = linear_graph(64, 8, FLOAT32)
    Assignment({"weight": tensor}).assign(builder.graph, lambda count: None)
    with raises(WeightError, "weights.not-finite", "'stored.weight'"):
        [value.const_value.numpy() for value in builder.graph.initializers.values()]


def test_a_weight_knows_its_name_in_the_checkpoint() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__("block")
            self.proj = Linear(64, 8, form=INT8)

        def forward(self, op, x):
            return self.proj(op, x)

    builder = new_graph("block")
    x = builder.input("x", FLOAT, [1, 64])
    add_output(builder, Block()(builder.op, x), "y", FLOAT, [1, 8])
    weights = [v for v in builder.graph.initializers.values() if isinstance(v, Weight)]
    assert {weight.keys for weight in weights} == {("block.proj.weight",)}
    assert len(weights) == 2


# Several layers in one matrix

PARTS = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


class Packed(nn.Module):
    """Several layers of one input under their parent, in one matrix or each in its own."""

    def __init__(self, form: Format, *, together: bool):
        super().__init__("block")
        wide = [Linear(64, PARTS, bias=True, form=form)] if together else []
        self.qkv_proj = wide[0] if together else None
        for name in PARTS if not together else ():
            setattr(self, name, Linear(64, PARTS[name], bias=True, form=form))

    def forward(self, op, x):
        if self.qkv_proj is not None:
            return self.qkv_proj(op, x)
        return op.Concat(*(getattr(self, name)(op, x) for name in PARTS), axis=-1)


def packed_graph(form: Format, *, together: bool = True) -> GraphBuilder:
    builder = new_graph("block")
    x = builder.input("x", FLOAT, ["rows", 64])
    half = x if form.dtype == FLOAT else builder.op.Cast(x, to=form.dtype)
    y = Packed(form, together=together)(builder.op, half)
    y = y if form.dtype == FLOAT else builder.op.Cast(y, to=FLOAT)
    add_output(builder, y, "y", FLOAT, ["rows", sum(PARTS.values())])
    return builder


def packed_tensors() -> dict[str, np.ndarray]:
    """A scale of its own for each layer, so that a scale shared among them would show."""
    tensors = {}
    for i, (name, rows) in enumerate(PARTS.items()):
        tensors[f"block.{name}.weight"] = normal(rows, 64, seed=i) * 10**i
        tensors[f"block.{name}.bias"] = normal(rows, seed=10 + i)
    return tensors


def stored_arrays(builder: GraphBuilder) -> dict[str, np.ndarray]:
    """Initializers that are made from the checkpoint, by the name after their module's."""
    tensors = {name: InMemory(name, array) for name, array in packed_tensors().items()}
    Assignment(tensors).assign(builder.graph, lambda count: None)
    weights = [v for v in builder.graph.initializers.values() if isinstance(v, Weight)]
    assert all(weight.name and weight.const_value is not None for weight in weights)
    return {w.name.removeprefix("block."): w.const_value.numpy() for w in weights}


@pytest.mark.parametrize("form", [FLOAT32, FLOAT16, W8A8, INT8, INT4, INT4_FLOAT16], ids=str)
def test_packed_layers_have_the_bits_of_separate_ones(form: Format) -> None:
    together = stored_arrays(packed_graph(form))
    apart = stored_arrays(packed_graph(form, together=False))
    assert len(together) == (2 if form.bits is None else 3)
    for name, array in together.items():
        leaf = name.removeprefix("qkv_proj.")
        parts = [apart[f"{part}.{leaf}"] for part in PARTS]
        along_last = leaf in ("weight", "weight_quantized") and (form.bits is None or form.dynamic)
        np.testing.assert_array_equal(array, np.concatenate(parts, axis=-1 if along_last else 0))


@pytest.mark.parametrize("form", [FLOAT32, W8A8, INT8, INT4], ids=str)
def test_packed_layers_give_what_separate_ones_give(form: Format) -> None:
    x = normal(5, 64, seed=2)
    together, apart = (
        open_graph(packed_graph(form, together=one), packed_tensors()).run(None, {"x": x})[0]
        for one in (True, False)
    )
    assert np.std(together) > 1
    np.testing.assert_allclose(together, apart, rtol=1e-6, atol=1e-6 * np.abs(apart).max())


def test_a_packed_matrix_reads_each_of_its_tensors_once() -> None:
    stored = {name: InMemory(name, array) for name, array in packed_tensors().items()}
    assignment, graph = Assignment(stored), packed_graph(INT4).graph
    assignment.assign(graph, lambda count: None)
    assignment.finish(lambda key: False)
    for value in graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()
    assert all(tensor.reads == [name] for name, tensor in stored.items())


@pytest.mark.parametrize("form", [FLOAT32, W8A8, INT4], ids=str)
def test_each_tensor_of_a_packed_matrix_is_named(form: Format) -> None:
    tensors = packed_tensors()
    del tensors["block.q_proj.weight"], tensors["block.v_proj.bias"]
    tensors["block.k_proj.weight"] = normal(9, 64)
    with pytest.raises(WeightError) as caught:
        open_graph(packed_graph(form), tensors)
    message = str(caught.value)
    assert "2 of 6 weights unset: 'block.q_proj.weight', 'block.v_proj.bias'" in message
    assert "; 1 of 6 weights" in message
    assert "'block.k_proj.weight' [9, 64], expected [8, 64]" in message


def test_the_tensor_that_float16_cannot_hold_is_named() -> None:
    tensors = packed_tensors()
    tensors["block.k_proj.weight"][3, 3] = 1e6
    graph = packed_graph(FLOAT16).graph
    stored = {name: InMemory(name, array) for name, array in tensors.items()}
    Assignment(stored).assign(graph, lambda count: None)
    with pytest.raises(WeightError, match=r"block\.k_proj\.weight' holds 1e\+06"):
        [value.const_value.numpy() for value in graph.initializers.values()]
