"""Where patches lie, against transformers' own functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from tests.graph.running import open_graph
from vlmport.graph.builder import add_output, new_graph
from vlmport.graph.grids import frames_of

INT64 = ir.DataType.INT64
OUTPUTS = ("sizes", "frame", "height", "width", "row", "column")


@cache
def graph(merge: int) -> Callable[[np.ndarray, int], dict[str, np.ndarray]]:
    builder = new_graph("grids")
    op = builder.op
    grids = builder.input("image_grid_thw", INT64, ["num_images", 3])
    rows = builder.input("rows", INT64, [1])
    frames = frames_of(op, grids, rows, merge)
    patches = frames.patches(op, merge)
    values = (frames.sizes, patches.frame, patches.height, patches.width)
    values = (*values, patches.row, patches.column)
    for name, value in zip(OUTPUTS, values, strict=True):
        add_output(builder, value, name, INT64, [f"num_{name}"])
    session = open_graph(builder, {})

    def run(grids: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        values = session.run(None, {"image_grid_thw": grids, "rows": np.array([rows])})
        return {name: np.asarray(value) for name, value in zip(OUTPUTS, values, strict=True)}

    return run


@st.composite
def merges_and_grids(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    merge = draw(st.sampled_from([1, 2, 3]))
    side = st.integers(1, 9).map(lambda blocks: blocks * merge)
    grids = draw(st.lists(st.tuples(st.integers(1, 3), side, side), min_size=1, max_size=4))
    return merge, np.array(grids, np.int64)


@settings(deadline=None)
@given(merges_and_grids())
def test_rows_columns_and_frames_are_those_of_transformers(case: tuple[int, np.ndarray]) -> None:
    merge, grids = case
    got = graph(merge)(grids, int(grids.prod(axis=1).sum()))
    places = get_vision_position_ids(torch.tensor(grids), merge).numpy()
    np.testing.assert_array_equal(np.stack([got["row"], got["column"]], axis=-1), places)
    ends = get_vision_cu_seqlens(torch.tensor(grids)).numpy()
    np.testing.assert_array_equal(np.cumsum([0, *got["sizes"]]), ends)
    np.testing.assert_array_equal(got["frame"], np.repeat(np.arange(len(ends) - 1), np.diff(ends)))
    picture = np.repeat(np.arange(len(grids)), grids.prod(axis=1))
    np.testing.assert_array_equal(got["height"], grids[picture, 1])
    np.testing.assert_array_equal(got["width"], grids[picture, 2])


@pytest.mark.parametrize(
    ("grids", "rows", "reason"),
    [
        ([[1, 4, 6]], 23, "image_grid_thw and the rows of pixel_values do not match"),
        ([[1, 4, 6], [1, 2, 2]], 24, "image_grid_thw and the rows of pixel_values do not match"),
        ([[1, 3, 8]], 24, "a side is 0 or not a multiple of 2"),
        ([[1, 0, 8]], 0, "a side is 0 or not a multiple of 2"),
        ([[1, -2, -2]], 4, "a side is 0 or not a multiple of 2"),
    ],
)
def test_grids_that_do_not_match_are_refused(
    grids: list[list[int]], rows: int, reason: str
) -> None:
    with pytest.raises(Exception, match=f"Name:'refused: .*{reason}"):
        graph(2)(np.array(grids), rows)
