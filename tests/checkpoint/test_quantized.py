"""Quantized checkpoints: what bitsandbytes and transformers make of the same bytes, else one line
that names the method. Nothing of a quantization_config is carried on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.qwen_checkpoints import write_qwen2_5
from vlmport.bundle import Bundle
from vlmport.checkpoint import Checkpoint
from vlmport.checkpoint.weights import Weights
from vlmport.errors import WeightError
from vlmport.exporter import export

LIBRARY = (
    Path(__file__).with_name("saved_by_bitsandbytes") / "weights.safetensors"
)  # see write.py there
PACKED = ("nf4", "fp4", "nested", "stored_as_bf16", "int8")
STATE = "quant_state.bitsandbytes__nf4"
Tensors = dict[str, np.ndarray]


def folder_with(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "any", **(config or {})})
    return folder


def change(folder: Path, edit: Callable[[Tensors], Any], **config: Any) -> Path:
    """Of a whole checkpoint, some tensors and keys of config.json."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", settings | config)
    return folder


def failure(folder: Path) -> WeightError:
    with pytest.raises(WeightError) as caught:
        [tensor.numpy() for tensor in Checkpoint.open(folder).weights.values()]
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


@pytest.mark.parametrize("name", PACKED)
def test_the_values_are_those_of_bitsandbytes(name: str, tmp_path: Path) -> None:
    tensors = load_file(LIBRARY)
    expected = tensors[f"expected.{name}"].astype(np.float32)
    own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    weights = Weights.open(folder_with(tmp_path / "checkpoint", {**own, "other": expected[0]}))
    assert sorted(weights) == sorted([f"{name}.weight", "other"])
    assert weights[f"{name}.weight"].shape == expected.shape
    np.testing.assert_array_equal(weights[f"{name}.weight"].numpy(), expected)


def test_lora_on_top_of_four_bits(tmp_path: Path) -> None:
    own = {
        key.replace("nf4.weight", "nf4.base_layer.weight"): value
        for key, value in load_file(LIBRARY).items()
        if key.startswith("nf4.")
    }
    own["nf4.lora_A.default.weight"] = np.zeros((2, 48), "f4")
    own["nf4.lora_B.default.weight"] = np.zeros((40, 2), "f4")
    weights = Weights.open(folder_with(tmp_path / "checkpoint", own))
    assert list(weights) == ["nf4.weight"]
    assert list(weights.pairs) == ["nf4.weight"]


def float8(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * 100
    return values.astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("shape", "told", "grid"),
    [
        ((256, 384), None, (2, 3)),
        ((200, 130), [128, 128], (2, 2)),  # the last blocks are smaller
        ((64, 96), [32, 16], (2, 6)),
        ((64, 96), [128, 128], (4, 2)),  # the scales say otherwise
        ((64, 96), None, ()),
    ],
)
def test_8_bit_floats_in_blocks(
    shape: tuple[int, int], told: Any, grid: tuple[int, ...], tmp_path: Path
) -> None:
    values, scales = float8(*shape), np.random.default_rng(1).random(grid).astype("f4")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": told}}
    tensors = {
        "a.weight": values,
        "a.weight_scale_inv": scales,
        "a.activation_scale": np.ones(1, "f4"),
    }
    weights = Weights.open(folder_with(tmp_path / "checkpoint", tensors), config)
    assert list(weights) == ["a.weight"]
    block = [-(-side // count) for side, count in zip(shape, grid or (1, 1), strict=True)]
    if shape == (200, 130):
        block = [128, 128]
    each = np.kron(scales.reshape(grid or (1, 1)), np.ones(block, "f4"))[: shape[0], : shape[1]]
    np.testing.assert_array_equal(weights["a.weight"].numpy(), values.astype("f4") * each)


def test_8_bit_floats_as_transformers_reads_them(tmp_path: Path) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values, scales = float8(256, 128), np.float32([[0.3], [7.1]])
    tensors = {"a.weight": values, "a.weight_scale_inv": scales}
    ours = Weights.open(folder_with(tmp_path / "checkpoint", tensors))["a.weight"].numpy()
    packed = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(packed, torch.from_numpy(scales))
    np.testing.assert_array_equal(ours, theirs.numpy())


def one_state(edit: dict[str, Any]) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        key = f"nested.weight.{STATE}"
        state = json.loads(tensors[key].tobytes()) | edit
        tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.pop("nested.weight.absmax"),
        lambda tensors: tensors.pop("nested.weight.nested_quant_map"),
        lambda tensors: tensors.pop("nested.weight"),
        lambda tensors: tensors.update({"nested.weight.absmax": np.zeros(9, "u1")}),
        lambda tensors: tensors.update({"nested.weight.quant_map": np.zeros(9, "f4")}),
        lambda tensors: tensors.update({f"nested.weight.{STATE}": np.zeros(9, "u1")}),
        one_state({"shape": [2**20, 2**20]}),
        one_state({"shape": [160, -128]}),
        one_state({"shape": None}),
        one_state({"blocksize": 0}),
        one_state({"blocksize": 2**30}),
        one_state({"nested_blocksize": 2**30}),
        one_state({"dtype": "int4"}),
        one_state({"nested_offset": "x"}),
        lambda tensors: tensors.pop("int8.weight"),
        lambda tensors: tensors.update({"int8.weight_format": np.uint8([2])}),
        lambda tensors: tensors.update({"int8.SCB": np.zeros(7, "f4")}),
        lambda tensors: tensors.update({"int8.weight": np.zeros((40, 48), "f4")}),
    ],
)
def test_parts_that_do_not_fit(spoil: Callable[[Tensors], Any], tmp_path: Path) -> None:
    tensors = {k: v for k, v in load_file(LIBRARY).items() if k.startswith(("nested.", "int8."))}
    spoil(tensors)
    error = failure(folder_with(tmp_path / "checkpoint", tensors))
    assert error.code == "weights.quantized-incomplete"
    assert "nested.weight" in str(error) or "int8." in str(error)


def test_scales_that_fit_no_blocks(tmp_path: Path) -> None:
    tensors = {"a.weight": float8(64, 96), "a.weight_scale_inv": np.ones((5, 7), "f4")}
    error = failure(folder_with(tmp_path / "checkpoint", tensors))
    assert error.code == "weights.quantized-incomplete"
    assert "[5, 7]" in str(error)


INTS, SCALES = np.zeros((8, 4), "i4"), np.ones((2, 8), "f2")


@pytest.mark.parametrize(
    ("tensors", "config", "method"),
    [
        (
            {"a.qweight": INTS, "a.qzeros": INTS, "a.scales": SCALES},
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "AWQ, 4 bits",
        ),
        (
            {"a.qweight": INTS, "a.g_idx": INTS[0], "a.scales": SCALES},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "GPTQ, 4 bits",
        ),
        ({"a.qweight": INTS, "a.scales": SCALES}, {}, "GPTQ or AWQ"),
        (
            {"a.weight_packed": INTS, "a.weight_scale": SCALES},
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "compressed-tensors",
        ),
        (
            {"a.weight": float8(8, 8), "a.weight_scale": SCALES},
            {"text_config": {"compression_config": {"format": "float-quantized"}}},
            "compressed-tensors",
        ),
        ({"a.weight": float8(8, 8)}, {}, "F8_E4M3"),
        (
            {"a.W_q": INTS.view("u1"), "a.scale": SCALES, "a.zero": SCALES},
            {"quantization_config": {"quant_method": "hqq"}},
            "HQQ",
        ),
        (
            {"a.weight": INTS.view("u4"), "a.scales": SCALES, "a.biases": SCALES},
            {"quantization": {"group_size": 64, "bits": 4}},
            "MLX, 4 bits",
        ),
        (
            {"a.weight._data": INTS.view("i1"), "a.weight._scale": SCALES},
            {"quantization_config": {"quant_method": "quanto"}},
            "Quanto",
        ),
        (
            {"a.weight": INTS.view("u1")},
            {"quantization_config": {"load_in_4bit": True}},
            "bitsandbytes",
        ),
        (
            {"a.gate_blocks": INTS.view("u1"), "a.gate_scales": INTS.view("u1")},
            {"quantization_config": {"quant_method": "mxfp4"}},
            "MXFP4",
        ),
        (
            {"a.codes": INTS.view("i2")},
            {"quantization_config": {"quant_method": "vptq" + "q" * 999}},
            "vptqqq",
        ),
        ({"a.weight": INTS.view("i1")}, {"quantization_config": {"quant_method": 3}}, "unnamed"),
    ],
)
def test_other_methods_are_named(
    tensors: Tensors, config: dict[str, Any], method: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "checkpoint", {**tensors, "b.weight": SCALES}, config)
    (folder / "README.md").write_text("---\nbase_model: org/plain\n---\n", encoding="utf-8")
    error = failure(folder)
    assert error.code == "weights.quantized"
    assert f"quantized with {method}" in str(error) or method == "unnamed"
    assert next(iter(tensors)) in str(error)
    assert "org/plain" in (error.hint or "")


STALE = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_a_config_that_was_left_over_is_not_carried_on(tmp_path: Path) -> None:
    """As after dequantize() and save_pretrained(), which leave it in either section."""
    folder = write_qwen2_5(tmp_path / "qwen", spelling="v5", config={"quantization_config": STALE})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["text_config"]["quantization_config"] = STALE
    settings["vision_config"]["compression_config"] = STALE
    write_json(folder / "config.json", settings)
    export(folder, tmp_path / "out", precisions="fp32")
    written = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert "quantization_config" not in written
    assert "compression_config" not in written
    assert "tie_word_embeddings" in written


def test_a_quantized_checkpoint_is_exported(tmp_path: Path) -> None:
    """The graphs are those of the same model in floats, to the byte."""
    name = "projection.projection.weight"
    packed = np.random.default_rng(3).integers(-127, 128, (32, 32)).astype(np.int8)
    scales = np.linspace(0.5, 2, 32, dtype="f4")

    def quantize(tensors: Tensors) -> None:
        module = name.removesuffix("weight")
        tensors |= {
            name: packed,
            f"{module}SCB": scales,
            f"{module}weight_format": np.zeros((), "u1"),
        }

    def plain(tensors: Tensors) -> None:
        values = packed.astype("f4") * scales[:, None] * np.float32(7.874015718698502e-3)
        tensors[name] = values

    quantized = change(
        write_prefix_checkpoint(tmp_path / "quantized"), quantize, quantization_config=STALE
    )
    bundles: list[Bundle] = [
        export(quantized, tmp_path / "a", precisions="q8", name="x"),
        export(
            change(write_prefix_checkpoint(tmp_path / "plain"), plain),
            tmp_path / "b",
            precisions="q8",
            name="x",
        ),
    ]
    first, second = (bundle.manifest.files for bundle in bundles)
    assert first == second
