"""One model, one bundle: twice the same bytes, whatever spelling the checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import CONFIG, write_json, write_prefix_checkpoint, write_weights
from tests.exporter.comparing import contents, first_logits, graphs
from vlmport.bundle import Bundle
from vlmport.exporter import export, writing


@pytest.fixture(scope="session")
def tiny_graphs(tiny_bundle: Path) -> dict[str, str]:
    return graphs(tiny_bundle)


def export_twin(tmp_path: Path, **settings: Any) -> dict[str, str]:
    write_prefix_checkpoint(tmp_path / "twin", **settings)
    export(tmp_path / "twin", tmp_path / "out")
    return graphs(tmp_path / "out")


def test_twice_the_same_bytes(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny_bundle)


@pytest.mark.parametrize(
    "settings",
    [{"spelling": "v5"}, {"shards": 3}, {"module_prefix": True}],
    ids=["v5", "shards", "module."],
)
def test_spellings_of_one_model_give_one_bundle(
    settings: dict[str, Any], tiny_graphs: dict[str, str], tmp_path: Path
) -> None:
    assert export_twin(tmp_path, **settings) == tiny_graphs


def test_another_seed_gives_other_bytes(tiny_graphs: dict[str, str], tmp_path: Path) -> None:
    """So that the comparisons can fail; only preprocessing has no weights."""
    twin = export_twin(tmp_path, seed=1)
    same = [name for name in twin if twin[name] == tiny_graphs[name]]
    assert same == ["onnx/image_processor.onnx"]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_read_exactly(dtype: Any, tmp_path: Path) -> None:
    """As the same values stored as float32."""
    half = write_prefix_checkpoint(tmp_path / "half", dtype=dtype, lora=False)
    stored = load_file(half / "model.safetensors")
    full = write_prefix_checkpoint(tmp_path / "full", lora=False)
    write_weights(full, {name: tensor.astype(np.float32) for name, tensor in stored.items()})
    for folder in (half, full):
        export(folder, tmp_path / f"{folder.name}-out", precisions="fp32")
    assert graphs(tmp_path / "half-out") == graphs(tmp_path / "full-out")


def merged_by_hand(folder: Path, out: Path) -> Path:
    """The checkpoint with its LoRA merged by plain numpy, written without any of PEFT's names."""
    write_prefix_checkpoint(out, lora=False)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    factor = np.float32(config["lora_alpha"] / config["lora_r"])
    merged = {}
    for name, tensor in tensors.items():
        if "lora_" in name:
            continue
        module = name.removesuffix(".base_layer.weight")
        if module != name:
            a, b = (tensors[f"{module}.lora_{half}.default.weight"] for half in "AB")
            tensor, name = tensor + factor * (b @ a), f"{module}.weight"
        merged[name.replace("base_model.model.", "")] = tensor
    write_weights(out, merged)
    return out


def test_lora_is_merged_as_by_hand(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    hand = merged_by_hand(tiny_checkpoint, tmp_path / "hand")
    export(hand, tmp_path / "out", precisions="fp32")
    ours, theirs = first_logits(tiny_bundle), first_logits(tmp_path / "out")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    write_prefix_checkpoint(tmp_path / "fresh", lora="fresh")
    export(tmp_path / "fresh", tmp_path / "fresh-out", precisions="fp32")
    assert np.abs(first_logits(tmp_path / "fresh-out") - theirs).max() > 0.1


def write_adapter(folder: Path, checkpoint: Path, **settings: Any) -> Path:
    """The LoRA of a checkpoint as a PEFT folder trained on the language model."""
    folder.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    start = "language_model."
    lora = {
        name.removeprefix(start).replace(".default.", "."): tensor
        for name, tensor in tensors.items()
        if "lora_" in name
    }
    save_file(lora, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": CONFIG["lora_r"],
        "lora_alpha": CONFIG["lora_alpha"],
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "bias": "none",
    }
    write_json(folder / "adapter_config.json", config | settings)
    return folder


def test_an_adapter_folder_gives_the_same_graphs(
    tiny_checkpoint: Path, tiny_graphs: dict[str, str], tmp_path: Path
) -> None:
    base = write_prefix_checkpoint(tmp_path / "base", lora=False)
    adapter = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    export(base, tmp_path / "out", adapter=adapter)
    assert graphs(tmp_path / "out") == tiny_graphs
    export(base, tmp_path / "plain", precisions="fp32")
    decoder = "onnx/decoder_model_merged.onnx"
    assert graphs(tmp_path / "plain")[decoder] != tiny_graphs[decoder]


def test_projections_and_biases_reach_the_graphs(tmp_path: Path) -> None:
    text = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    write_prefix_checkpoint(tmp_path / "wide", projection="mlp", text=text)
    export(tmp_path / "wide", tmp_path / "out", precisions="fp32")
    decoder = onnx.load(tmp_path / "out/onnx/decoder_model_merged.onnx")
    names = {tensor.name for tensor in decoder.graph.initializer}
    assert "language_model.model.layers.0.self_attn.qkv_proj.bias" in names
    assert "language_model.model.layers.1.mlp.down_proj.bias" in names
    assert np.isfinite(first_logits(tmp_path / "out")).all()


# External data


def test_large_graphs_keep_their_weights_beside_them(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "INLINE_BYTES", 30_000)
    bundle = export(tiny_checkpoint, tmp_path / "out")
    external = {
        variant.model: variant.data
        for forms in bundle.manifest.components.values()
        for variant in forms.values()
        if variant.data
    }
    decoder, tower = "onnx/decoder_model_merged.onnx", "onnx/vision_encoder.onnx"
    assert external[decoder] == (f"{decoder}_data",)
    assert external[tower] == (f"{tower}_data",)
    assert "onnx/embed_tokens.onnx" not in external  # too small
    assert {f for files in external.values() for f in files} <= set(bundle.manifest.files)
    for precision in ("fp32", "q4"):
        ours, theirs = (
            first_logits(tmp_path / "out", precision),
            first_logits(tiny_bundle, precision),
        )
        np.testing.assert_array_equal(ours, theirs)
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    declared = config["transformers.js_config"]["use_external_data_format"]
    assert declared == {Path(model).name: 1 for model in external}
    Bundle.open(tmp_path / "out", check_hashes=True)


def test_external_data_is_split_as_browsers_need_it(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the files that transformers.js counts: no suffix, _1, _2, …"""
    monkeypatch.setattr(writing, "INLINE_BYTES", 30_000)
    monkeypatch.setattr(writing, "DATA_FILE_BYTES", 30_000)
    bundle = export(tiny_checkpoint, tmp_path / "out", precisions="fp32")
    decoder = "onnx/decoder_model_merged.onnx"
    files = bundle.variant("decoder_model_merged", "fp32").data
    assert len(files) > 2
    assert files == (f"{decoder}_data", *(f"{decoder}_data_{i}" for i in range(1, len(files))))
    assert all(0 < bundle.manifest.files[name].size <= 30_000 for name in files)
    stored = {path.name for path in (tmp_path / "out/onnx").glob("decoder*_data*")}
    assert stored == {Path(name).name for name in files}
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    declared = config["transformers.js_config"]["use_external_data_format"]
    assert declared["decoder_model_merged.onnx"] == len(files)
    ours, theirs = first_logits(tmp_path / "out"), first_logits(tiny_bundle)
    np.testing.assert_array_equal(ours, theirs)


def test_a_tensor_larger_than_a_part_has_its_own(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "INLINE_BYTES", 0)
    monkeypatch.setattr(writing, "DATA_FILE_BYTES", 1)
    bundle = export(tiny_checkpoint, tmp_path / "out", precisions="fp32")
    graph = onnx.load(tmp_path / "out/onnx/embed_tokens.onnx", load_external_data=False).graph
    large = [one for one in graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    assert len(bundle.variant("embed_tokens", "fp32").data) == len(large)
    assert np.isfinite(first_logits(tmp_path / "out")).all()


def test_external_data_is_the_same_twice(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "INLINE_BYTES", 0)
    for name in ("one", "two"):
        export(tiny_checkpoint, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bfloat16_values_survive_the_way(tmp_path: Path) -> None:
    """One weight, followed from the file to the graph."""
    folder = write_prefix_checkpoint(tmp_path / "half", dtype="BF16", lora=False)
    export(folder, tmp_path / "out", precisions="fp32")
    stored = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    graph = onnx.load(tmp_path / "out/onnx/embed_tokens.onnx").graph
    table = onnx.numpy_helper.to_array(graph.initializer[0])
    np.testing.assert_array_equal(table[:-1], stored.astype(np.float32))
    assert not table[-1].any()
