"""The reference is what transformers and PEFT themselves load, and refuses what they leave out."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_json, write_prefix_checkpoint, write_weights
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.checkpoint import Checkpoint
from vlmport.errors import (
    AdapterError,
    TokenizerError,
    VerificationError,
    VlmportError,
    WeightError,
)
from vlmport.families import family_of
from vlmport.parity.references import load_reference

INDEX = "model.safetensors.index.json"
IDS = np.arange(3, 15)
Write = Callable[..., Path]
WRITERS: dict[str, Write] = {
    "idefics3": write_idefics3_checkpoint,
    "qwen2_5": write_qwen2_5,
    "qwen3": write_qwen3,
}
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def load(folder: Path, adapter: Path | None = None, ignored: tuple[str, ...] = ()) -> Any:
    raw = json.loads((folder / "config.json").read_text())
    token = raw.get("image_token_id", 113)
    return load_reference(folder, image_token_id=token, adapter=adapter, ignored=ignored)


def said(reference: Any) -> np.ndarray:
    """Logits of a text."""
    width = reference.dims["hidden_size"] * (1 + getattr(reference, "lanes", 0))
    embeds = reference.embeds(IDS, np.zeros((0, width), np.float32))
    return reference.logits(embeds, reference.position_ids(IDS))


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write_weights(folder, tensors)
    return folder


# Weights


@pytest.mark.parametrize("write", [write_prefix_checkpoint, write_qwen3])
def test_a_stale_index_beside_the_weights(tmp_path: Path, write: Write) -> None:
    """It was read, with shards of an earlier save: a right bundle was called wrong."""
    other = write(tmp_path / "other", seed=7, shards=2)
    folder = write(tmp_path / "model")
    expected = said(load(folder))
    for path in other.glob("model*"):
        shutil.copyfile(path, folder / path.name)
    np.testing.assert_array_equal(said(load(folder)), expected)
    for path in folder.glob("model-*"):
        path.unlink()
    np.testing.assert_array_equal(said(load(folder)), expected)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_head_of_its_own_counts_before_the_flag(tmp_path: Path, write: Write) -> None:
    folder = write(tmp_path / "model", config={"tie_word_embeddings": True})
    tied = said(load(folder))

    def double(tensors: dict[str, np.ndarray]) -> None:
        (table,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
        tensors["lm_head.weight"] = tensors[table] * 2

    own = said(load(change(folder, double)))
    np.testing.assert_allclose(own, 2 * tied, rtol=1e-5, atol=1e-5)


def test_weights_that_do_not_fit_are_counted_as_they_are(tmp_path: Path) -> None:
    """Each of 125 under another name was once "250 of 125 weights"."""
    folder = write_idefics3_checkpoint(tmp_path / "model")
    count = len(load_file(folder / "model.safetensors"))

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[f"other.{name}"] = tensors.pop(name)

    with pytest.raises(WeightError) as caught:
        load(change(folder, rename))
    assert caught.value.code == "weights.unset"
    assert f"{count} of {count} weights missing: " in str(caught.value)
    assert f"{count} surplus: " in str(caught.value)


@pytest.mark.parametrize("write", [write_prefix_checkpoint, write_qwen2_5, write_qwen3])
def test_tensors_that_an_export_left_out_need_no_place(tmp_path: Path, write: Write) -> None:
    folder = write(tmp_path / "model")
    expected = said(load(folder))
    surplus = ("talker.weight", "model.talker.weight")
    change(folder, lambda tensors: tensors.update(dict.fromkeys(surplus, np.ones(3, "f4"))))
    with pytest.raises(WeightError) as caught:
        load(folder)
    assert caught.value.code == "weights.surplus"
    assert "2 surplus: 'model." in str(caught.value)
    np.testing.assert_array_equal(said(load(folder, ignored=surplus)), expected)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_idefics3_checkpoint, "model.vision_model.embeddings.position_ids"),
        (write_qwen2_5, "visual.rotary_pos_emb.inv_freq"),
        (write_qwen3, "model.language_model.layers.0.self_attn.rotary_emb.cos_cached"),
        (write_prefix_checkpoint, "language_model.base_model.model.model.rotary_emb.sin_cached"),
    ],
)
def test_buffers_that_older_versions_stored(tmp_path: Path, write: Write, name: str) -> None:
    """The export passes over them: a right bundle could not be verified."""
    folder = write(tmp_path / "model")
    expected = said(load(folder))
    change(folder, lambda tensors: tensors.update({name: np.ones(4, "f4")}))
    np.testing.assert_array_equal(said(load(folder)), expected)


def test_names_that_transformers_does_not_know_are_its_refusal(tmp_path: Path) -> None:
    """Qwen3-VL has never had Qwen2-VL's names."""
    folder = write_qwen3(tmp_path / "model", names="visual")
    with pytest.raises(WeightError) as caught:
        load(folder)
    assert caught.value.code == "weights.unset"


# Quantized

LEFT_OVER = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def with_config(folder: Path, settings: Mapping[str, Any]) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**raw, **settings})
    return folder


def test_plain_weights_are_plain_whatever_is_left_over_in_the_config(tmp_path: Path) -> None:
    """With the leftover config, transformers would quantize them again."""
    folder = write_qwen3(tmp_path / "model")
    expected = said(load(folder))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    both = {"quantization_config": LEFT_OVER}
    with_config(folder, {**both, "text_config": {**text, **both}})
    np.testing.assert_array_equal(said(load(folder)), expected)


def test_8_bit_floats_are_read_by_transformers(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "model")
    packed: dict[str, np.ndarray] = {}

    def to_8_bits(tensors: dict[str, np.ndarray]) -> None:
        """The decoder's matrices, in blocks of 16; what stays in `tensors` is what they are."""
        for name in [one for one in tensors if "language_model" in one and "proj" in one]:
            scale = np.float32(np.abs(tensors[name]).max() / 400)
            packed[name] = (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
            blocks = [-(-side // 16) for side in tensors[name].shape]
            packed[f"{name}_scale_inv"] = np.full(blocks, scale, "f4")
            tensors[name] = packed[name].astype("f4") * scale

    expected = said(load(change(folder, to_8_bits)))
    file = folder / "model.safetensors"
    save_file({**load_file(file), **packed}, file, metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    settings |= {"activation_scheme": "dynamic", "modules_to_not_convert": ["visual", "lm_head"]}
    with_config(folder, {"quantization_config": settings})
    np.testing.assert_array_equal(said(load(folder)), expected)


# What transformers can't load


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (write_qwen3, {"text": {"hidden_act": "nothing"}}),
        (write_idefics3_checkpoint, {"vision": {"num_attention_heads": 5}}),
        (write_prefix_checkpoint, {"text": {"num_attention_heads": "many"}}),
    ],
)
def test_a_config_that_transformers_refuses(tmp_path: Path, write: Write, settings: Any) -> None:
    folder = write(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    for section, values in settings.items():
        raw[f"{section}_config"] |= values
    write_json(folder / "config.json", raw)
    with pytest.raises(VerificationError) as caught:
        load(folder)
    assert caught.value.code == "verify.reference-fails"
    assert caught.value.hint is not None
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("damage", "kind", "code"),
    [
        ("tokenizer.json", TokenizerError, "source.not-json"),  # vlmport reads it first
        ("preprocessor_config.json", VerificationError, "verify.reference-fails"),
    ],
)
def test_a_file_that_transformers_can_not_read(
    tmp_path: Path, damage: str, kind: type[VlmportError], code: str
) -> None:
    folder = write_qwen3(tmp_path / "model")
    (folder / damage).write_text("{")
    with pytest.raises(kind) as caught:
        load(folder)
    assert caught.value.code == code


# Adapters

TARGETS = ["q_proj", "down_proj", "fc1", "linear_fc1", "qkv", "out_proj"]


def adapter_of(folder: Path, part: str, out: Path, **settings: Any) -> Path:
    """A random adapter that PEFT trained on a part of the model ('' is the whole)."""
    kind: Any = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(str(folder), dtype=torch.float32).get_submodule(part)
        options = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **settings}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(str(out))
    return out


def renamed(adapter: Path, out: Path, names: Mapping[str, str]) -> Path:
    """The same adapter under names that begin otherwise, in its settings too."""
    shutil.copytree(adapter, out)
    stored = load_file(out / "adapter_model.safetensors")
    prefix = "base_model.model."

    def other(name: str) -> str:
        new, old = next(pair for pair in names.items() if name.startswith(pair[0]))
        return old + name.removeprefix(new)

    tensors = {prefix + other(name.removeprefix(prefix)): stored[name] for name in stored}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "adapter_config.json").read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {other(name): value for name, value in settings[key].items()}
    write_json(out / "adapter_config.json", settings)
    return out


# family → the decoder's name, and the names of transformers 4.51 or of the decoder with a head
OLD: dict[str, tuple[str, dict[str, str]]] = {
    "idefics3": ("model.text_model", {"model.text_model.": "model.", "lm_head": "lm_head"}),
    "qwen2_5": (
        "model.language_model",
        {"model.language_model.": "model.", "model.visual.": "visual.", "lm_head": "lm_head"},
    ),
    "qwen3": ("model.language_model", {"model.language_model.": "model."}),
}


def numbers(reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a text, and features of a picture."""
    from vlmport.parity.pictures import drawn_pictures

    picture = drawn_pictures([(60, 40)])[0].image
    return said(reference), reference.vision_features(reference.pixels(picture))


@pytest.mark.parametrize("family", OLD)
def test_an_adapter_is_the_same_by_whatever_names_it_was_trained(
    tmp_path: Path, family: str
) -> None:
    """Trained on the decoder alone, with a head or without, and by the names of transformers 4."""
    folder = WRITERS[family](tmp_path / "model")
    decoder, names = OLD[family]
    strong = {f"{decoder}.layers.1.self_attn.q_proj": 4}
    settings: dict[str, Any] = {
        "rank_pattern": strong,
        "alpha_pattern": dict.fromkeys(strong, 11),
        "target_modules": r".*(text_model|language_model).*(q_proj|down_proj)",
    }
    whole = adapter_of(folder, "", tmp_path / "whole", **settings)
    expected = numbers(load(folder, whole))
    assert np.abs(expected[0] - said(load(folder))).max() > 0.1
    plain = {f"{decoder}.": ""}
    for at, other in enumerate((names, plain, {"model.": ""})):
        adapter = renamed(whole, tmp_path / str(at), other)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        write_json(
            adapter / "adapter_config.json",
            settings | {"target_modules": r".*layers\.\d+\.(self_attn|mlp)\.(q_proj|down_proj)"},
        )
        if family == "idefics3" and other == {"model.": ""}:
            continue  # its tower's layers are called alike there
        for ours, theirs in zip(numbers(load(folder, adapter)), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_an_adapter_of_tower_and_decoder_by_old_names(tmp_path: Path) -> None:
    """`visual.…` and `model.…`, a pair for the head among them; the export merges the same."""
    folder = write_qwen2_5(tmp_path / "model")
    targets = [*TARGETS, "lm_head"]
    whole = adapter_of(folder, "", tmp_path / "whole", target_modules=targets)
    old = renamed(whole, tmp_path / "old", OLD["qwen2_5"][1])
    stored = load_file(old / "adapter_model.safetensors")
    assert any(name.startswith("base_model.model.visual.") for name in stored)
    expected = numbers(load(folder, whole))
    for ours, theirs in zip(numbers(load(folder, old)), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    checkpoint = Checkpoint.open(folder)
    merged = [family_of(checkpoint).weights(checkpoint, one) for one in (whole, old)]
    for name in merged[0]:
        np.testing.assert_array_equal(merged[0][name].numpy(), merged[1][name].numpy())


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_no_tensor_of_an_adapter_is_left_out(tmp_path: Path, half: str) -> None:
    """Not one of the file, and not one that a target would need."""
    folder = write_qwen2_5(tmp_path / "model")
    adapter = adapter_of(folder, "", tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if half in name)
    save_file({**stored, name.replace("layers.0", "layers.8"): stored[name]}, file)
    with pytest.raises(AdapterError, match=r"layers\.8") as caught:
        load(folder, adapter)
    assert caught.value.code == "adapter.not-of-this-model"
    save_file({one: value for one, value in stored.items() if one != name}, file)
    with pytest.raises(AdapterError, match=f"missing .*{half}") as caught:
        load(folder, adapter)
    assert caught.value.code == "adapter.not-of-this-model"
