"""Qwen3-VL's vision tower equals transformers' Qwen3VLVisionModel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from tests.graph.running import open_graph
from tests.qwen_checkpoints import VISION_3
from vlmport.errors import ConfigError
from vlmport.families.qwen_vl.tower_3 import PositionTable, Qwen3VisionConfig, VisionTower
from vlmport.graph.builder import add_output, new_graph
from vlmport.graph.grids import frames_of
from vlmport.graph.parameters import FLOAT16, FLOAT32, INT8, W8A8, Format

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
BASE = {**VISION_3, "out_hidden_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "odd heads": {"hidden_size": 36, "num_heads": 3, "intermediate_size": 37},
    "large merge, one frame a patch": {"spatial_merge_size": 3, "temporal_patch_size": 1},
    "no merge": {"spatial_merge_size": 1},
    "no lanes": {"deepstack_visual_indexes": []},
    "lanes in another order": {"deepstack_visual_indexes": [3, 0, 2]},
    "exact gelu": {"hidden_act": "gelu"},
    "one learnt position": {"num_position_embeddings": 1},
    "no square": {"num_position_embeddings": 30},
    "other rotation": {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
    "rotation by an older name": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
}


def make(
    form: Format = FLOAT32, zero: str | None = None, **changes: Any
) -> tuple[Qwen3VLVisionModel, ort.InferenceSession, Qwen3VisionConfig]:
    """A random tower, in torch and as a graph; `zero` names a weight zeroed in the graph only."""
    raw = {**BASE, **changes}
    torch.manual_seed(0)
    settings = Qwen3VLVisionConfig(**raw)
    settings._attn_implementation = "eager"
    model = Qwen3VLVisionModel(settings).eval()
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight) * (0.2 if weight.ndim > 1 else 0.1)
        weight.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    tensors = {f"visual.{name}": one.detach().numpy() for name, one in model.state_dict().items()}
    if zero is not None:
        tensors[f"visual.{zero}"] = np.zeros_like(tensors[f"visual.{zero}"])
    config = Qwen3VisionConfig.read(raw, "config.json")
    builder = new_graph("vision_encoder")
    pixels = builder.input("pixel_values", FLOAT, ["num_patches", config.patch_width])
    grids = builder.input("image_grid_thw", INT64, ["num_images", 3])
    features = VisionTower(config, form, "visual")(builder.op, pixels, grids)
    if form.dtype != FLOAT:
        features = builder.op.Cast(features, to=FLOAT)
    add_output(builder, features, "image_features", FLOAT, ["num_features", "width"])
    return model, open_graph(builder, tensors), config


def both(
    model: Qwen3VLVisionModel,
    session: ort.InferenceSession,
    config: Qwen3VisionConfig,
    blocks: list[tuple[int, int, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """The graph's features and torch's, lanes behind, for grids of these frames and blocks."""
    merge = config.spatial_merge_size
    grids = np.array([(t, h * merge, w * merge) for t, h, w in blocks], np.int64)
    rows = int(grids.prod(axis=1).sum())
    pixels = np.random.default_rng(rows).uniform(-1, 1, (rows, config.patch_width))
    pixels = pixels.astype(np.float32)
    with torch.no_grad():
        made = model(torch.from_numpy(pixels), grid_thw=torch.from_numpy(grids))
    truth = torch.cat([made.pooler_output, *made.deepstack_features], dim=-1).numpy()
    (got,) = session.run(None, {"pixel_values": pixels, "image_grid_thw": grids})
    return np.asarray(got), truth


@pytest.fixture(scope="module")
def tower() -> tuple[Qwen3VLVisionModel, ort.InferenceSession, Qwen3VisionConfig]:
    return make()


def assert_close(got: np.ndarray, truth: np.ndarray) -> None:
    assert got.shape == truth.shape
    np.testing.assert_allclose(got, truth, atol=1e-5 * np.abs(truth).max())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_features_equal_transformers(changes: dict[str, Any]) -> None:
    model, session, config = make(**changes)
    for blocks in ([(1, 1, 1)], [(1, 5, 3)], [(1, 2, 7), (1, 4, 1), (1, 3, 3)]):
        got, truth = both(model, session, config, blocks)
        assert got.shape[1] == 24 * (1 + len(config.deepstack_visual_indexes))
        assert_close(got, truth)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4
    )
)
def test_one_graph_takes_grids_of_any_size(tower: Any, blocks: list[tuple[int, int, int]]) -> None:
    assert_close(*both(*tower, blocks))


def test_four_thousand_patches(tower: Any) -> None:
    assert_close(*both(*tower, [(1, 16, 64)]))


def test_a_picture_among_others_is_as_it_is_alone(tower: Any) -> None:
    """To the rounding of a longer sum: nothing is seen of the others."""
    together, _ = both(*tower, [(1, 3, 4), (1, 6, 2)])
    _, session, config = tower
    pixels = np.random.default_rng(96).uniform(-1, 1, (96, config.patch_width))
    second = {
        "pixel_values": pixels.astype(np.float32)[48:],
        "image_grid_thw": np.array([[1, 12, 4]]),
    }
    (alone,) = session.run(None, second)
    assert_close(together[12:], np.asarray(alone))


@pytest.mark.parametrize("side", [1, 2, 7, 24, 48])
def test_positions_between_learnt_ones_are_those_of_transformers_to_the_bit(side: int) -> None:
    builder = new_graph("positions")
    op, width = builder.op, 5
    config = Qwen3VisionConfig(hidden_size=width, num_position_embeddings=side**2)
    grids = builder.input("image_grid_thw", INT64, ["num_images", 3])
    rows = builder.input("rows", INT64, [1])
    patches = frames_of(op, grids, rows, 2).patches(op, 2)
    made = PositionTable(config, FLOAT32)(op, patches)
    add_output(builder, made, "positions", FLOAT, [1, "num_patches", width])
    table = np.random.default_rng(side).standard_normal((side**2, width)).astype(np.float32)
    session = open_graph(builder, {"weight": table})
    sizes = [2, 14, 46, 48, 50, 96]
    for height in sizes:
        grid = np.array([(1, height, width) for width in sizes], np.int64)
        feeds = {"image_grid_thw": grid, "rows": grid.prod(axis=1).sum(keepdims=True)}
        (got,) = session.run(None, feeds)
        index, weight = get_vision_interpolation_indices_and_weights(
            torch.from_numpy(grid),
            side,
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=2,
        )
        truth = (torch.from_numpy(table)[index] * weight[:, :, None]).sum(1).numpy()
        np.testing.assert_array_equal(np.asarray(got)[0], truth)


@pytest.mark.parametrize(
    "zeroed",
    [
        "pos_embed.weight",
        "patch_embed.proj.bias",
        "blocks.2.attn.qkv.bias",
        "merger.norm.bias",
        "deepstack_merger_list.1.norm.weight",
    ],
)
def test_the_comparison_can_fail(zeroed: str) -> None:
    got, truth = both(*make(zero=zeroed), [(1, 3, 5)])
    assert np.abs(got - truth).max() > 1e-3 * np.abs(truth).max()


@pytest.mark.parametrize(("form", "error"), [(INT8, 0.02), (W8A8, 0.05), (FLOAT16, 0.002)])
def test_other_forms_are_close(form: Format, error: float) -> None:
    for blocks in ([(1, 4, 6)], [(1, 4, 6), (1, 2, 2)]):
        got, truth = both(*make(form), blocks)
        assert np.abs(got - truth).max() > 0
        assert np.linalg.norm(got - truth) < error * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"in_channels": 1}, "in_channels"),
        ({"num_heads": 5}, "num_heads"),
        ({"num_heads": 16}, "expected a multiple of 4"),
        ({"deepstack_visual_indexes": [0, 4]}, r"deepstack_visual_indexes \[0, 4\]"),
        ({"deepstack_visual_indexes": [1, 1]}, "different layers below 4"),
        ({"num_position_embeddings": 0}, "num_position_embeddings"),
    ],
)
def test_towers_that_are_not_computed_are_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: vision_config.*{reason}") as caught:
        Qwen3VisionConfig.read({**BASE, **wrong}, "config.json: vision_config")
    assert caught.value.hint
