"""The shipped checkpoint is in distilvit2's format, small, and free of the trainer's traces."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "src" / "vlmport" / "builtin" / "shapes"
CONFIG_KEYS = {
    "architectures",
    "freeze_vision_encoder",
    "lora_alpha",
    "lora_dropout",
    "lora_r",
    "lora_target_modules",
    "max_length",
    "mlp_hidden_dim",
    "model_type",
    "projection_dim",
    "projection_type",
    "text_config",
    "vision_config",
    "vision_unfreeze_layers",
}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    """Weight name to shape, from the safetensors header alone."""
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"F16"}
    return {name: entry["shape"] for name, entry in header.items()}


def test_files_and_bytes() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000


def test_config_has_distilvit2s_keys(config: dict[str, Any]) -> None:
    assert config.keys() == CONFIG_KEYS
    assert config["model_type"] == "prefix_conditioning_vlm"
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    assert config["text_config"]["model_type"] == "llama"
    names = {config[part]["_name_or_path"] for part in ("vision_config", "text_config")}
    assert names == {""}


def test_weights_are_wrapped_as_peft_wraps_them(
    config: dict[str, Any], shapes: dict[str, list[int]]
) -> None:
    text, r = config["text_config"], config["lora_r"]
    attention = "language_model.base_model.model.model.layers.0.self_attn"
    hidden, keys = text["hidden_size"], text["num_key_value_heads"] * text["head_dim"]
    assert shapes[f"{attention}.k_proj.base_layer.weight"] == [keys, hidden]
    assert shapes[f"{attention}.k_proj.lora_A.default.weight"] == [r, hidden]
    assert shapes[f"{attention}.k_proj.lora_B.default.weight"] == [keys, r]
    embeddings = "language_model.base_model.model.model.embed_tokens.weight"
    assert shapes[embeddings] == [text["vocab_size"], hidden]
    assert shapes["projection.projection.weight"] == [
        hidden,
        config["vision_config"]["hidden_size"],
    ]
    assert "vision_encoder.vision_model.post_layernorm.weight" in shapes
    assert not any("lm_head" in name for name in shapes)


def test_inner_sizes_divide_into_blocks_of_32(shapes: dict[str, list[int]]) -> None:
    """Four-bit quantization takes 32 inputs to a block."""
    linear = {n: s for n, s in shapes.items() if len(s) == 2 and "lora" not in n}
    assert all(shape[1] % 32 == 0 for shape in linear.values())


def test_tokenizer_ends_with_id_0() -> None:
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"]["<|endoftext|>"] == 0
    assert [token["id"] for token in tokenizer["added_tokens"]] == [0]
