"""The front: one folder, its config, its weights under one spelling, LoRA merged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.checkpoints import (
    DTYPES,
    prefix_config,
    prefix_tensors,
    write_prefix_checkpoint,
    write_tokenizer,
    write_weights,
)
from tests.errors import raises
from vlmport.checkpoint import Checkpoint, LoraScale, Weights, merged
from vlmport.errors import ConfigError, SourceError, WeightError

LORA = LoraScale(r=4, alpha=8)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"spelling": "v5"},
    {"shards": 3},
    {"module_prefix": True},
    {"spelling": "v5", "shards": 2, "module_prefix": True},
]


def rename(name: str) -> str:
    return name.replace("vision_encoder.vision_model.", "vision_encoder.")


def values(folder: Path, lora: LoraScale | None = LORA) -> dict[str, np.ndarray]:
    tensors = merged(Checkpoint.open(folder).weights, rename=rename, lora=lora)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("options", VARIANTS)
def test_every_spelling_of_a_model_gives_the_same_weights(
    tmp_path: Path, options: dict[str, Any], projection: Any
) -> None:
    folder = write_prefix_checkpoint(tmp_path, projection=projection, **options)
    got = values(folder)
    config = prefix_config("v5", projection, "F32")
    plain = prefix_tensors(config, spelling="v5", lora=False)
    assert set(got) == set(plain)
    adapted = {name for name in plain if "language_model" in name and "_proj.weight" in name}
    adapted = {name for name in adapted if "self_attn" in name}
    assert len(adapted) == 8
    wrapped = prefix_tensors(config, spelling="v5")
    for name, value in plain.items():
        if name not in adapted:
            np.testing.assert_array_equal(got[name], value)
            continue
        pair = name.replace("model.model", "model.base_model.model.model").removesuffix("weight")
        a, b = (wrapped[f"{pair}lora_{half}.default.weight"] for half in "AB")
        np.testing.assert_allclose(got[name], value + 2 * (b @ a), rtol=1e-5, atol=1e-6)
        assert not np.array_equal(got[name], value)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_read_and_merged_in_float32(tmp_path: Path, dtype: Any) -> None:
    full = values(write_prefix_checkpoint(tmp_path / "F32"))
    half = values(write_prefix_checkpoint(tmp_path / dtype, dtype=dtype))
    name = "language_model.model.norm.weight"
    np.testing.assert_array_equal(half[name], full[name].astype(DTYPES[dtype]).astype("f4"))
    for name, value in half.items():
        np.testing.assert_allclose(value, full[name], atol=0.05)


def test_a_fresh_adapter_changes_nothing(tmp_path: Path) -> None:
    fresh = values(write_prefix_checkpoint(tmp_path / "fresh", lora="fresh"))
    plain = values(write_prefix_checkpoint(tmp_path / "plain", lora=False))
    for name, value in plain.items():
        np.testing.assert_array_equal(fresh[name], value)
    assert values(tmp_path / "plain", lora=None).keys() == plain.keys()


def test_the_builder_takes_other_sizes_and_seeds(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(
        tmp_path / "a",
        vision={"num_hidden_layers": 1, "vision_use_head": False},
        text={"vocab_size": 300, "tie_word_embeddings": False},
        config={"lora_r": 3, "lora_target_modules": ["q_proj"]},
        seed=1,
    )
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.weights.pairs) == 2
    got = values(folder, LoraScale(3, 8))
    assert got["language_model.lm_head.weight"].shape == (300, 32)
    assert not any("head.probe" in name or "encoder.layers.1" in name for name in got)
    other = values(write_prefix_checkpoint(tmp_path / "b"))
    name = "language_model.model.norm.weight"
    assert not np.array_equal(got[name], other[name])


@pytest.mark.parametrize("vocab_size", [97, 113, 271])
def test_the_builders_tokenizer(tmp_path: Path, vocab_size: int) -> None:
    write_tokenizer(tmp_path, vocab_size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab_size
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    text = "A red Square, 12 on the\nquay."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (len(tokenizer.encode("the quay").ids) < 8) == (vocab_size > 97)


def test_the_front_reads_config_and_side_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_prefix_checkpoint(tmp_path)))
    assert checkpoint.folder == tmp_path
    assert checkpoint.model_type == "prefix_conditioning_vlm"
    assert checkpoint.config["text_config"]["vocab_size"] == 113
    settings = checkpoint.json("tokenizer_config.json")
    assert settings is not None
    assert settings["eos_token"] == "<|endoftext|>"
    assert checkpoint.json("preprocessor_config.json") is None
    (tmp_path / "generation_config.json").write_text("[]")
    with raises(ConfigError, "source.not-json", "generation_config.json"):
        checkpoint.json("generation_config.json")


@pytest.mark.parametrize(("config", "got"), [("{}", None), ('{"model_type": 3}', 3)])
def test_no_model_type(tmp_path: Path, config: str, got: int | None) -> None:
    write_prefix_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with raises(ConfigError, "config.wrong-value", "config.json", "model_type", "string", got):
        _ = Checkpoint.open(tmp_path).model_type


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with raises(SourceError, "source.not-found", tmp_path / "x"):
        Checkpoint.open(tmp_path / "x")


def test_both_spellings_in_one_folder_collide(tmp_path: Path) -> None:
    both = {
        name: np.ones(1, "f4") for name in ("vision_encoder.vision_model.x", "vision_encoder.x")
    }
    write_weights(tmp_path, both)
    both = "'vision_encoder.vision_model.x', 'vision_encoder.x'"
    with raises(WeightError, "weights.ambiguous", "1 names", "'vision_encoder.x' is", both):
        merged(Weights.open(tmp_path), rename=rename)


def test_reading_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_prefix_checkpoint(tmp_path)
    code = (
        "import sys; from vlmport.checkpoint import Checkpoint, LoraScale, merged\n"
        "c = Checkpoint.open(sys.argv[1]); m = merged(c.weights, lora=LoraScale(4, 8))\n"
        "[t.numpy() for t in m.values()]\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
