"""Qwen2.5-VL's tower against transformers' own, at grids of every kind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from tests.graph.running import graph_bytes, open_graph
from vlmport.errors import ConfigError
from vlmport.families.qwen_vl.tower_2_5 import Qwen2_5VisionConfig, VisionTower
from vlmport.graph.builder import GraphBuilder, add_output, new_graph
from vlmport.graph.parameters import FLOAT32, Format
from vlmport.graph.precision import PRECISIONS

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Grids = Sequence[tuple[int, int, int]]

TINY: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": 24,
    "patch_size": 4,
    "window_size": 16,  # 4 x 4 patches
    "fullatt_block_indexes": [1],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "windows that end within a block": {**TINY, "window_size": 23, "patch_size": 3},
    "windows of one block": {**TINY, "window_size": 8},
    "blocks of nine": {**TINY, "spatial_merge_size": 3, "window_size": 24},
    "no blocks": {**TINY, "spatial_merge_size": 1, "temporal_patch_size": 1},
    "full alone": {**TINY, "fullatt_block_indexes": [0, 1, 2], "hidden_act": "gelu"},
    "windows alone": {**TINY, "fullatt_block_indexes": [], "num_heads": 2},
}
GRIDS: dict[str, Grids] = {
    "the smallest": [(1, 2, 2)],
    "one whole window": [(1, 4, 4)],
    "partial windows": [(1, 6, 10)],
    "a line": [(1, 2, 34)],
    "a column": [(1, 34, 2)],
    "several pictures": [(1, 6, 10), (1, 2, 2), (1, 8, 8)],
    "equal pictures": [(1, 6, 4)] * 3,
    "frames": [(3, 6, 4), (1, 2, 6)],
    "4096 patches": [(1, 64, 64)],
    "more": [(1, 48, 100)],
}


@cache
def reference(name: str) -> Qwen2_5_VisionTransformerPretrainedModel:
    """With weights large enough that attention is no mean."""
    model = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**CONFIGS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = 0.3 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model.eval()


@cache
def session(
    name: str, form: Format = FLOAT32, full: tuple[int, ...] | None = None
) -> ort.InferenceSession:
    return open_graph(*tower(name, form, full))


def tower(
    name: str, form: Format = FLOAT32, full: tuple[int, ...] | None = None
) -> tuple[GraphBuilder, dict[str, np.ndarray]]:
    """The tower; `full` makes other blocks than the config's see whole pictures."""
    raw: Mapping[str, Any] = CONFIGS[name]
    raw = raw if full is None else {**raw, "fullatt_block_indexes": [*full]}
    config = Qwen2_5VisionConfig.read(raw, name)
    builder = new_graph("vision_encoder")
    op = builder.op
    rows = builder.input("pixel_values", FLOAT, ["num_patches", config.patch_width])
    grids = builder.input("image_grid_thw", INT64, ["num_images", 3])
    features = VisionTower(config, form, "visual")(op, rows, grids)
    features = op.Cast(features, to=FLOAT)
    add_output(builder, features, "image_features", FLOAT, ["n", config.out_hidden_size])
    weights = reference(name).state_dict()
    return builder, {f"visual.{key}": value.numpy() for key, value in weights.items()}


def inputs(name: str, grids: Grids) -> tuple[np.ndarray, np.ndarray]:
    config = Qwen2_5VisionConfig.read(CONFIGS[name], name)
    table = np.array(grids, np.int64)
    count = int(table.prod(axis=1).sum())
    rows = np.random.default_rng(count).normal(size=(count, config.patch_width))
    return rows.astype(np.float32), table


def differences(
    name: str, grids: Grids, form: Format = FLOAT32, full: tuple[int, ...] | None = None
) -> np.ndarray:
    """Of each number of the features, in units of the largest."""
    rows, table = inputs(name, grids)
    feeds = {"pixel_values": rows, "image_grid_thw": table}
    got = np.asarray(session(name, form, full).run(None, feeds)[0])
    with torch.no_grad():
        want = reference(name)(torch.tensor(rows), torch.tensor(table)).pooler_output.numpy()
    assert got.shape == want.shape
    return np.abs(got - want) / np.abs(want).max()


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_the_features_are_those_of_transformers(grids: Grids) -> None:
    assert differences("tiny", grids).max() < 5e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_any_windows_patches_and_blocks(name: str) -> None:
    merge = CONFIGS[name].get("spatial_merge_size", 2)
    sides = [(1, 1), (2, 2), (3, 5), (7, 4)]
    for grids in ([(1, h * merge, w * merge)] for h, w in sides):
        assert differences(name, grids).max() < 5e-6
    assert differences(name, [(1, h * merge, w * merge) for h, w in sides]).max() < 5e-6


SIDE = st.integers(1, 12).map(lambda blocks: 2 * blocks)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.just(1), SIDE, SIDE), min_size=1, max_size=3))
def test_any_grids(grids: Grids) -> None:
    assert differences("tiny", grids).max() < 5e-6


def test_without_windows_the_features_are_others() -> None:
    """What the tests above would see: nothing within one window, much beyond."""
    assert differences("tiny", [(1, 4, 4)], full=(0, 1, 2)).max() < 5e-6
    assert differences("tiny", [(1, 6, 10)], full=(0, 1, 2)).max() > 0.05
    assert differences("tiny", [(1, 6, 10)], full=()).max() > 0.05


def test_a_picture_has_the_features_that_it_has_alone() -> None:
    grids = [(1, 6, 10), (1, 2, 2), (1, 8, 4)]
    rows, table = inputs("tiny", grids)
    together = session("tiny").run(None, {"pixel_values": rows, "image_grid_thw": table})[0]
    cuts = np.cumsum(table.prod(axis=1))[:-1]
    alone = [
        session("tiny").run(None, {"pixel_values": part, "image_grid_thw": grid[None]})[0]
        for part, grid in zip(np.split(rows, cuts), table, strict=True)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "grids", [[(1, 128, 128)], [(1, 128, 64), (1, 8, 8), (1, 4, 16)], [(1, 64, 64)] * 4]
)
def test_nothing_is_masked_or_filled_up(tmp_path: Path, grids: Grids) -> None:
    """Nor are there scores, of 16,384 patches each with each: those of four heads would be 4 GB,
    and as many again for each small picture beside a large one that is filled up to its length."""
    path = tmp_path / "tower.onnx"
    path.write_bytes(graph_bytes(*tower("tiny")))
    program = f"""
import numpy as np, onnxruntime as ort
session = ort.InferenceSession({str(path)!r}, providers=["CPUExecutionProvider"])
grids = np.array({grids!r})
rows = np.ones((grids.prod(axis=1).sum(), 96), np.float32)
session.run(None, {{"pixel_values": rows, "image_grid_thw": grids}})
status = open("/proc/self/status").read()  # getrusage would count the process that forked this
print(status.partition("VmHWM:")[2].split()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 500_000  # kB; measured: 190 MB


# The largest and the mean difference, at about twice what was measured.
ROUNDED = {
    "fp16": (0.002, 0.0004),
    "q8": (0.06, 0.013),
    "q4": (0.03, 0.007),
    "q4f16": (0.03, 0.007),
}


@pytest.mark.parametrize("precision", ROUNDED)
def test_rounded_forms_are_near(precision: str) -> None:
    form = PRECISIONS[precision].vision
    for grids in GRIDS["partial windows"], GRIDS["several pictures"]:
        found = differences("tiny", grids, form)
        most, mean = ROUNDED[precision]
        assert 0 < found.max() < most
        assert found.mean() < mean


@pytest.mark.parametrize("grids", [[(1, 4, 4)], [(1, 4, 4), (1, 2, 4)], [(1, 3, 7)]])
def test_grids_of_other_rows_are_refused(grids: Grids) -> None:
    rows, _ = inputs("tiny", [(1, 2, 10)])
    feeds = {"pixel_values": rows, "image_grid_thw": np.array(grids, np.int64)}
    with pytest.raises(Exception, match="refused: image_grid_thw"):
        session("tiny").run(None, feeds)


def test_absent_keys_mean_what_hugging_face_means_by_them() -> None:
    config, truth = Qwen2_5VisionConfig.read({}, "here"), Qwen2_5_VLVisionConfig()
    for field in dataclasses.fields(config):
        if field.name != "rope_theta":
            assert getattr(config, field.name) == getattr(truth, field.name), field.name
    rope = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**TINY)).config
    assert rope.rope_parameters == {"rope_type": "axial", "rope_theta": config.rope_theta}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"window_size": 7}, "window_size 7 is less than spatial_merge_size 2 patches of 4"),
        ({"hidden_size": 24, "num_heads": 4}, "expected a multiple of 4"),
        ({"hidden_size": 30, "num_heads": 4}, "expected a multiple of 4"),
        ({"in_channels": 1}, r"in_channels=1 \(supported: 3\)"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear', expected 'axial'"),
        ({"patch_size": [4, 4]}, "patch_size"),
    ],
)
def test_configs_that_are_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Qwen2_5VisionConfig.read({**TINY, **raw}, "here")
