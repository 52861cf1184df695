"""Weights and tensors brought together by name: all of them or an error that names the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.errors import raises
from vlmport.errors import OptionError, WeightError
from vlmport.exporter.assign import Assignment
from vlmport.graph.parameters import Source, Weight


@dataclass
class Tensor:
    """A tensor of a checkpoint; `loads` counts how often it was read."""

    name: str
    values: np.ndarray
    loads: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def numpy(self) -> np.ndarray:
        self.loads.append(1)
        return self.values


def tensors(**values: Any) -> dict[str, Any]:
    """Name → tensor; `model__proj` is model.proj."""
    named = {name.replace("__", "."): np.asarray(value, "f4") for name, value in values.items()}
    return {name: Tensor(f"file.{name}", value) for name, value in named.items()}


def weight(name: str, shape: tuple[int, ...] = (2,), **settings: Any) -> Weight:
    made = Weight(shape, **settings)
    made.name = name
    return made


def assigned(tensors: dict[str, Any], *weights: Weight) -> Assignment:
    assignment = Assignment(tensors)
    assign(assignment, *weights)
    return assignment


def assign(
    assignment: Assignment, *weights: Weight, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    constant = ir.Value(name="constant", const_value=ir.tensor([1.0], name="constant"))
    graph = ir.Graph([], [], nodes=[], initializers=[constant, *weights])
    assignment.assign(graph, on_bytes)


def nothing(key: str) -> bool:
    return False


def refused(assignment: Assignment, is_unused: Callable[[str], bool] = nothing) -> WeightError:
    with pytest.raises(WeightError) as caught:
        assignment.finish(is_unused)
    return caught.value


def test_a_weight_is_its_tensor_and_is_read_when_it_is_written() -> None:
    made, stored = weight("model.a"), tensors(model__a=[1, 2])
    told: list[int] = []
    assignment = Assignment(stored)
    assign(assignment, made, on_bytes=told.append)
    assignment.finish(nothing)
    assert stored["model.a"].loads == []
    for times in (1, 2):  # nothing is kept
        assert made.const_value is not None
        assert made.const_value.numpy().tolist() == [1, 2]
        assert len(stored["model.a"].loads) == times
    assert told == [8, 8]


def test_several_tensors_are_packed_each_converted_by_itself() -> None:
    sources = [
        Source((1, 2), module="q_proj"),
        Source((2, 2), lambda load: load() * 10, module="k_proj"),
    ]
    made = weight("layer.qkv_proj.weight", (3, 2), sources=sources)
    stored = tensors(
        layer__q_proj__weight=[[1, 2]],
        layer__k_proj__weight=[[3, 4], [5, 6]],
    )
    assigned(stored, made).finish(nothing)
    assert made.const_value is not None
    assert made.const_value.numpy().tolist() == [[1, 2], [30, 40], [50, 60]]


def test_one_of_several_that_is_missing_leaves_the_weight_without_data() -> None:
    made = weight("q.w", (2,), sources=[Source((1,), module="a"), Source((1,), module="b")])
    assignment = assigned(tensors(a__w=[1]), made)
    assert made.const_value is None
    error = refused(assignment)
    assert error.code == "weights.unset"
    assert "'b.w'" in str(error)
    assert "'a.w'" not in str(error)


def test_a_transposed_tensor_has_the_number_of_values_and_another_shape() -> None:
    stored = tensors(a=np.zeros((2, 3)))
    error = refused(assigned(stored, weight("a", (3, 2))))
    assert error.code == "weights.misshapen"
    assert "'a' [2, 3], expected [3, 2]" in str(error)
    assert stored["a"].loads == []


def test_a_tensor_that_no_graph_reads() -> None:
    assignment = assigned(tensors(a=[1, 2], b=[1], rotary__inv_freq=[1]), weight("a"))
    error = refused(assignment, lambda key: key.endswith("inv_freq"))
    assert error.code == "weights.surplus"
    assert re.fullmatch(r"1 tensors [^']*: 'b'", str(error))


def test_all_graphs_count() -> None:
    """What one graph does not read another may."""
    stored = tensors(a=[1, 2], b=[1, 2])
    assignment = Assignment(stored)
    assign(assignment, weight("a"))
    assert refused(assignment).code == "weights.surplus"
    assign(assignment, weight("b"))
    assignment.finish(nothing)


def test_a_tied_matrix_may_be_read_under_either_name() -> None:
    stored = tensors(embed=[1, 2])
    stored["lm_head"] = stored["embed"]
    assigned(stored, weight("embed")).finish(nothing)
    assigned(stored, weight("lm_head")).finish(nothing)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(bad: float) -> None:
    made = weight("a")
    assigned(tensors(a=[1, bad]), made)
    assert made.const_value is not None
    with raises(WeightError, "weights.not-finite", "'file.a'"):
        made.const_value.numpy()


def test_the_stored_type_is_the_weights_own() -> None:
    made = weight("a", dtype=ir.DataType.FLOAT16)
    assigned(tensors(a=[1 + 2**-12, 65504]), made)
    assert made.const_value is not None
    values = made.const_value.numpy()
    assert values.dtype == np.float16
    assert values.tolist() == [1, 65504]


def test_what_float16_can_not_hold() -> None:
    made = weight("a", dtype=ir.DataType.FLOAT16)
    assigned(tensors(a=[1, -70000]), made)
    assert made.const_value is not None
    with raises(WeightError, "weights.past-float16", "'file.a'", "7e") as caught:
        made.const_value.numpy()
    assert caught.value.code == "weights.past-float16"


# What is left out on purpose


def test_what_a_pattern_leaves_out_is_listed_by_the_files_names() -> None:
    assignment = assigned(tensors(a=[1, 2], talker__x=[1], talker__y=[1]), weight("a"))
    left = assignment.ignore(["talker.*", "talker.*", "file.talker.y"])
    assert left == {
        "talker.*": ("file.talker.x", "file.talker.y"),
        "file.talker.y": ("file.talker.y",),
    }
    assignment.finish(nothing)


def test_a_pattern_leaves_out_no_more_than_it_matches() -> None:
    assignment = assigned(tensors(a=[1, 2], talker__x=[1], tower__x=[1]), weight("a"))
    assignment.ignore(["talker.*"])
    assert re.fullmatch(r"1 tensors [^']*: 'tower\.x'", str(refused(assignment)))


def test_a_pattern_that_matches_nothing() -> None:
    assignment = assigned(tensors(a=[1, 2], b=[1]), weight("a"))
    with raises(OptionError, "option.ignores-nothing", "'Talker'", "2") as caught:
        assignment.ignore(["Talker"])
    assert caught.value.code == "option.ignores-nothing"


@pytest.mark.parametrize("pattern", ["*", "em*", "file.head"])
def test_a_pattern_that_matches_what_a_graph_needs(pattern: str) -> None:
    """By either name of a tied matrix: 'head' is the tensor that is read as 'embed'."""
    stored = tensors(embed=[1, 2], extra=[1])
    stored["head"] = stored["embed"]
    if pattern == "file.head":
        stored["head"].name = "file.head"
    with raises(OptionError, "option.ignores-needed-weights") as caught:
        assigned(stored, weight("embed")).ignore([pattern])
    assert caught.value.code == "option.ignores-needed-weights"
