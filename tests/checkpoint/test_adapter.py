"""Adapters that don't fit: each says which pair, what was expected and what was found."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoints import write_json, write_weights
from tests.errors import raises
from vlmport.checkpoint import LoraScale, Weights, lora, merged
from vlmport.checkpoint.adapter import PATTERNS, Adapter
from vlmport.errors import AdapterError, VlmportError

SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
LAYERS = [f"lm.layers.{i}.q_proj" for i in range(2)]
BASE = {f"{name}.weight": np.ones((3, 4), "f4") for name in LAYERS} | {
    "lm.norm.weight": np.ones(3, "f4"),
    "vision.q_proj.weight": np.ones((3, 4), "f4"),
}


def write_adapter(
    folder: Path,
    names: list[str],
    shape: tuple[int, int] = (3, 4),
    rank: int = 2,
    tensors: dict[str, np.ndarray] | None = None,
    **settings: Any,
) -> Path:
    """A PEFT folder with A and B of ones (A doubled) for each module."""
    folder.mkdir(exist_ok=True)
    stored = {}
    for name in names:
        stored[f"base_model.model.{name}.lora_A.weight"] = np.full((rank, shape[1]), 2, "f4")
        stored[f"base_model.model.{name}.lora_B.weight"] = np.ones((shape[0], rank), "f4")
    save_file(stored | (tensors or {}), folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {**SETTINGS, **settings})
    return folder


def base(folder: Path) -> Weights:
    write_weights(folder, BASE)
    return Weights.open(folder)


def failure(folder: Path, **options: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        merged(base(folder), adapter=folder / "adapter", **options)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_update_is_alpha_over_r_b_a(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS)
    tensors = merged(base(tmp_path), adapter=tmp_path / "adapter")
    for name in LAYERS:
        tensor = tensors[f"{name}.weight"]
        np.testing.assert_array_equal(tensor.numpy(), np.full((3, 4), 1 + 6 / 2 * 4))
        assert (tensor.shape, tensor.dtype) == ((3, 4), "F32")
        assert tensor.name == f"{name}.weight"
    assert set(tensors) == set(BASE)
    assert tensors["vision.q_proj.weight"].numpy().max() == 1


@pytest.mark.parametrize("block", [1, 5, 8, 1 << 22])
def test_blocks_of_rows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int
) -> None:
    monkeypatch.setattr(lora, "BLOCK", block)
    rng = np.random.default_rng(0)
    w, b, a = (rng.standard_normal(shape, "f4") for shape in ((7, 4), (7, 2), (2, 4)))
    stored = {"x.base_layer.weight": w, "x.lora_A.d.weight": a, "x.lora_B.d.weight": b}
    write_weights(tmp_path, stored)
    got = merged(Weights.open(tmp_path), lora=LoraScale(2, 3))["x.weight"].numpy()
    expected = w + np.float32(1.5) * (b @ a)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_merging_one_weight_peaks_near_its_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lora, "BLOCK", 1 << 16)
    w = np.ones((2048, 1024), "f4")
    stored = {"x.base_layer.weight": w, "x.lora_A.d.weight": np.ones((4, 1024), "f4")}
    write_weights(tmp_path, {**stored, "x.lora_B.d.weight": np.ones((2048, 4), "f4")})
    tensor = merged(Weights.open(tmp_path), lora=LoraScale(4, 4))["x.weight"]
    tracemalloc.start()
    tensor.numpy()
    assert tracemalloc.get_traced_memory()[1] < 1.2 * w.nbytes
    tracemalloc.stop()


def test_every_pair_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, shape=(3, 5))
    text = str(failure(tmp_path))
    assert "2 of 2 LoRA pairs don't fit" in text
    for name in LAYERS:
        got = "expected A [2, 4] and B [3, 2], got A [2, 5] and B [3, 2]"
        assert f"'{name}.weight': {got}" in text


def test_another_r_than_the_settings_say(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, rank=3)
    error = failure(tmp_path)
    assert "expected A [2, 4] and B [3, 2], got A [3, 4] and B [3, 3]" in str(error)
    assert "another r" in (error.hint or "")


def test_many_misfits_are_cut(tmp_path: Path) -> None:
    names = [f"lm.layers.{i}.q_proj" for i in range(11)]
    write_weights(tmp_path, {f"{name}.weight": np.ones((2, 2), "f4") for name in names})
    write_adapter(tmp_path / "adapter", names)
    with raises(AdapterError, "adapter.not-of-this-model", "11 of 11", "and 3 more"):
        merged(Weights.open(tmp_path), adapter=tmp_path / "adapter")


def test_a_target_that_is_no_matrix(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["lm.norm"])
    assert "'lm.norm.weight' is [3], expected a matrix" in str(failure(tmp_path))


def test_targets_absent_from_the_base_suggest_near_names(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["lm.layer.0.q_proj", "lm.layers.0.q_proj"])
    text = str(failure(tmp_path))
    assert "1 of 2 targets are not in the model: 'lm.layer.0.q_proj.weight'" in text
    assert "did you mean 'lm.layers.0.q_proj.weight'" in text


def test_half_a_pair(tmp_path: Path) -> None:
    extra = {"base_model.model.lm.layers.1.q_proj.lora_A.weight": np.ones((2, 4), "f4")}
    write_adapter(tmp_path / "adapter", LAYERS[:1], tensors=extra)
    error = failure(tmp_path)
    assert error.code == "adapter.incomplete"
    assert ": 1 LoRA tensors " in str(error)
    assert str(error).endswith(": 'lm.layers.1.q_proj.lora_A'")


def test_a_prefix_finds_the_part_that_was_trained(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["layers.0.q_proj", "layers.1.q_proj"])
    tensors = merged(base(tmp_path), adapter=tmp_path / "adapter", prefixes=["", "x.", "lm."])
    assert tensors[f"{LAYERS[1]}.weight"].numpy().max() > 1


def test_several_fitting_prefixes_are_ambiguous(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["q_proj"])
    text = str(failure(tmp_path, prefixes=["vision.", "lm.layers.0.", "vision."]))
    assert "fits 2 parts of the model" in text
    assert "'q_proj.weight' may be 'vision.q_proj.weight' or 'lm.layers.0.q_proj.weight'" in text


def test_no_prefix_at_all_fits(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["other.q_proj"])
    assert "1 of 1 targets are not in the model" in str(failure(tmp_path, prefixes=["a.", "b."]))


def test_two_pairs_for_one_weight_after_renaming(tmp_path: Path) -> None:
    write_weights(tmp_path, BASE)
    write_adapter(tmp_path / "adapter", ["lm.layers.0.q_proj", "lm.old.0.q_proj"])
    with raises(AdapterError, "adapter.ambiguous"):
        merged(
            Weights.open(tmp_path),
            rename=lambda name: name.replace("old", "layers"),
            adapter=tmp_path / "adapter",
        )


def test_a_layer_without_its_pair_means_an_incomplete_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS[:1])
    text = str(failure(tmp_path))
    assert "no LoRA pair for 1 weights that target_modules names: 'lm.layers.1.q_proj" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*0\.q_proj"},
        {"target_modules": ["lm.layers.0.q_proj"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["lm.layers.1.q_proj"]},
    ],
)
def test_a_layer_may_be_left_out_on_purpose(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_adapter(tmp_path / "adapter", LAYERS[:1], **settings)
    tensors = merged(base(tmp_path), adapter=tmp_path / "adapter")
    assert tensors[f"{LAYERS[0]}.weight"].numpy().max() > 1
    assert tensors[f"{LAYERS[1]}.weight"].numpy().max() == 1


def test_a_pattern_that_never_matches_in_time_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PATTERNS, "seconds", 0.5)
    write_adapter(tmp_path / "adapter", LAYERS, rank_pattern={"((([a-z_.0-9])*)*)*!": 4})
    assert failure(tmp_path).code == "adapter.slow-pattern"


@pytest.mark.parametrize("pattern", ["(" * 9000 + ")" * 9000, "a{" + "9" * 30 + "}", "[z-a]"])
def test_a_pattern_that_can_not_be_compiled(tmp_path: Path, pattern: str) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, rank_pattern={pattern: 4})
    assert len(str(failure(tmp_path))) < 1000


def test_a_long_plain_pattern_takes_no_time(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, alpha_pattern={"a." * 100_000 + "!": 4.0})
    Adapter.open(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "ADALORA"}, 'peft_type="ADALORA" (supported: "LORA")'),
        ({"bias": "all"}, 'bias="all" (supported: "none")'),
        ({"r": "8"}, 'r: expected an int of at least 1, got "8"'),
        ({"r": 0}, "r: expected an int of at least 1, got 0"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number, got null"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj': expected a number, got 0"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern: 'q_proj': expected a number, got 2.0"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern: 'q_proj': expected a number, got '1'"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object or null"),
        ({"use_dora": True}, "not plain LoRA: use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "not plain LoRA: modules_to_save=['lm_head']"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"invented_later": {"a": 1}, "use_bdlora": {}, "kasa_config": {"a": 1}},
         "not plain LoRA: invented_later={'a': 1}, kasa_config={'a': 1}"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16' changed the base weights"),
        ({"init_lora_weights": "loftq"}, "'loftq' changed the base weights"),
        ({"init_lora_weights": "new"}, "not plain LoRA: init_lora_weights='new'"),
        ({"init_lora_weights": ["x"]}, "not plain LoRA: init_lora_weights=['x']"),
    ],
)  # fmt: skip
def test_settings_that_are_not_plain_lora_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS, **settings)
    error = failure(tmp_path)
    assert expected in str(error)
    assert str(folder / "adapter_config.json") in str(error)


def test_no_peft_type(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS)
    write_json(folder / "adapter_config.json", {"r": 2})
    assert "missing 'peft_type'" in str(failure(tmp_path))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"base_model.model.merger.weight": 1}, "tensors that are not LoRA: 'merger.weight'"),
        ({"base_model.model.lm_head.bias": 1}, "tensors that are not LoRA: 'lm_head.bias'"),
        ({"base_model.model.lm_head.weight": 1}, "not in the model: 'lm_head.weight'"),
        ({f"base_model.model.{LAYERS[0]}.lora_magnitude_vector": 1}, "lora_magnitude_vector"),
        ({f"base_model.model.{LAYERS[0]}.lora_B.bias": 1}, "lora_B.bias"),
    ],
)
def test_tensors_that_are_not_pairs(tmp_path: Path, stored: dict[str, int], expected: str) -> None:
    tensors = {name: np.ones(3, "f4") for name in stored}
    write_adapter(tmp_path / "adapter", LAYERS, tensors=tensors)
    assert expected in str(failure(tmp_path))


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    assert "adapter_config.json: no such file" in str(failure(tmp_path))
    (folder / "adapter_config.json").write_text("{,}")
    assert "adapter_config.json: not JSON at line 1" in str(failure(tmp_path))
    write_json(folder / "adapter_config.json", SETTINGS)
    assert "expected adapter_model.safetensors, found none" in str(failure(tmp_path))
    (folder / "adapter_model.bin").write_bytes(b"x")
    error = failure(tmp_path)
    assert "only adapter_model.bin (pickled)" in str(error)
    assert "safe_serialization=True" in (error.hint or "")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors: empty (0 bytes)" in str(failure(tmp_path))
    save_file({}, folder / "adapter_model.safetensors")
    assert "no LoRA pairs" in str(failure(tmp_path))


def test_pairs_inside_without_a_scale(tmp_path: Path) -> None:
    stored = {"x.base_layer.weight": (3, 4), "x.lora_A.d.weight": (2, 4)}
    stored["x.lora_B.d.weight"] = (3, 2)
    write_weights(tmp_path, {name: np.ones(shape, "f4") for name, shape in stored.items()})
    weights = Weights.open(tmp_path)
    with raises(AdapterError, "adapter.unmerged", "1"):
        merged(weights)
    with raises(AdapterError, "adapter.not-of-this-model", "A [16, 4] and B [3, 16]", "A [2, 4]"):
        merged(weights, lora=LoraScale(16, 16))


def test_an_adapter_error_is_a_weight_error_of_ours(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS)
    adapter = Adapter.open(tmp_path / "adapter")
    assert adapter.scales[f"{LAYERS[0]}.weight"] == LoraScale(2, 6.0)
    assert issubclass(AdapterError, VlmportError)
