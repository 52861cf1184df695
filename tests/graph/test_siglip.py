"""The vision tower equals transformers' SiglipVisionModel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers

from tests.errors import raises
from tests.graph.running import open_graph
from vlmport.errors import ConfigError
from vlmport.graph.builder import add_output, new_graph
from vlmport.graph.parameters import FLOAT32, INT8, Format
from vlmport.graph.siglip import SiglipVisionConfig, SiglipVisionTower

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
    "vision_use_head": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "one patch": {"image_size": 6},
    "a remainder is not seen": {"image_size": 29},
    "exact gelu": {"hidden_act": "gelu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "odd heads": {"hidden_size": 30, "num_attention_heads": 6, "patch_size": 5},
    "loose norm": {"layer_norm_eps": 0.1},
    "many patches": {"image_size": 98, "patch_size": 7},
}
FLOAT = ir.DataType.FLOAT


def make(
    form: Format = FLOAT32, zero: str | None = None, **changes: Any
) -> tuple[transformers.SiglipVisionModel, ort.InferenceSession, SiglipVisionConfig]:
    """A random tower, in torch and as a graph; `zero` names a weight zeroed in the graph only."""
    raw = {**BASE, **changes}
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**raw)).eval()
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight) * (0.2 if weight.ndim > 1 else 0.1)
        weight.data = noise + 1 if "norm" in name and weight.ndim == 1 else noise
    tensors = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    if zero is not None:
        tensors[zero] = np.zeros_like(tensors[zero])
    config = SiglipVisionConfig.read(raw, "config.json")
    builder, size = new_graph("vision_encoder"), config.image_size
    pixels = builder.input("pixel_values", FLOAT, ["batch_size", 3, size, size])
    hidden = SiglipVisionTower(config, form)(builder.op, pixels)
    add_output(builder, hidden, "hidden", FLOAT, ["batch_size", config.num_patches, "width"])
    return model, open_graph(builder, tensors), config


def both(
    model: transformers.SiglipVisionModel, session: ort.InferenceSession, rows: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The graph's and torch's hidden states for a random picture in [-1, 1]."""
    size = model.config.image_size
    rng = np.random.default_rng(rows)
    pixels = rng.uniform(-1, 1, (rows, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        truth = model(pixel_values=torch.from_numpy(pixels)).last_hidden_state.numpy()
    return np.asarray(session.run(None, {"pixel_values": pixels})[0]), truth


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rows", [1, 2])
def test_hidden_states_equal_transformers(changes: dict[str, Any], rows: int) -> None:
    model, session, config = make(**changes)
    got, truth = both(model, session, rows)
    assert got.shape == (rows, config.num_patches, config.hidden_size)
    np.testing.assert_allclose(got, truth, atol=1e-5 * np.abs(truth).max())


@pytest.mark.parametrize(
    "zeroed",
    [
        "embeddings.position_embedding.weight",
        "encoder.layers.1.self_attn.q_proj.weight",
        "encoder.layers.0.mlp.fc1.bias",
    ],
)
def test_the_comparison_can_fail(zeroed: str) -> None:
    model, session, _ = make(zero=zeroed)
    got, truth = both(model, session)
    assert np.abs(got - truth).max() > 1e-3 * np.abs(truth).max()


def test_the_two_gelus_differ() -> None:
    """So that the comparison above tells them apart."""
    exact, tanh = (both(*make(hidden_act=kind)[:2])[0] for kind in ("gelu", "gelu_pytorch_tanh"))
    assert np.abs(exact - tanh).max() > 1e-5 * np.abs(exact).max()


def test_eight_bits_are_close() -> None:
    got, truth = both(*make(INT8)[:2])
    assert np.abs(got - truth).max() > 0
    assert np.linalg.norm(got - truth) < 0.02 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"hidden_act": "quick_gelu"}, "config.unsupported-value"),
        ({"num_channels": 1}, "config.unsupported-value"),
        ({"patch_size": 0}, "config.wrong-value"),
        ({"image_size": 7168}, "config.unsupported-value"),
    ],
)
def test_towers_that_are_not_computed_are_refused(wrong: dict[str, Any], code: str) -> None:
    with raises(ConfigError, code, "config.json: vision_config", next(iter(wrong))):
        SiglipVisionConfig.read({**BASE, **wrong}, "config.json: vision_config")


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 30}, {"image_size": 5}], ids=["heads", "no patch"]
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    facts = ("config.json: vision_config", next(iter(wrong)))
    with raises(ConfigError, "config.contradiction", *facts) as caught:
        SiglipVisionConfig.read({**BASE, **wrong}, "config.json: vision_config")
    assert caught.value.hint
