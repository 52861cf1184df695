"""Adapters that don't fit: each says which pair, what was expected and what was found."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoints import write_json, write_weights
from tests.errors import assert_error, raises
from vlmport.checkpoint import LoraScale, Weights, lora, merged
from vlmport.checkpoint.adapter import PATTERNS, Adapter
from vlmport.errors import AdapterError, VlmportError

SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
LAYERS = [f"lm.layers.{i}.q_proj" for i in range(2)]
BASE = {f"{name}.weight": np.ones((3, 4), "f4") for name in LAYERS} | {
    "lm.norm.weight": np.ones(3, "f4"),
    "vision.q_proj.weight": np.ones((3, 4), "f4"),
}
NOT_PLAIN, WRONG = "adapter.not-plain-lora", "adapter.wrong-setting"


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
    shapes = ("A [2, 4]", "B [3, 2]", "A [2, 5]", "B [3, 2]")
    facts = [fact for name in LAYERS for fact in (f"'{name}.weight'", *shapes)]
    assert_error(failure(tmp_path), "adapter.not-of-this-model", "2 of 2", *facts)


def test_another_r_than_the_settings_say(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, rank=3)
    error = failure(tmp_path)
    facts = ("A [2, 4]", "B [3, 2]", "A [3, 4]", "B [3, 3]")
    assert_error(error, "adapter.not-of-this-model", *facts)
    assert "another r" in (error.hint or "")


def test_many_misfits_are_cut(tmp_path: Path) -> None:
    names = [f"lm.layers.{i}.q_proj" for i in range(11)]
    write_weights(tmp_path, {f"{name}.weight": np.ones((2, 2), "f4") for name in names})
    write_adapter(tmp_path / "adapter", names)
    with raises(AdapterError, "adapter.not-of-this-model", "11 of 11", "and 3 more"):
        merged(Weights.open(tmp_path), adapter=tmp_path / "adapter")


def test_a_target_that_is_no_matrix(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["lm.norm"])
    facts = ("'lm.norm.weight'", "[3]", "matrix")
    assert_error(failure(tmp_path), "adapter.not-of-this-model", *facts)


def test_targets_absent_from_the_base_suggest_near_names(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["lm.layer.0.q_proj", "lm.layers.0.q_proj"])
    facts = ("1 of 2", "'lm.layer.0.q_proj.weight'", "'lm.layers.0.q_proj.weight'")
    assert_error(failure(tmp_path), "adapter.not-of-this-model", *facts)


def test_half_a_pair(tmp_path: Path) -> None:
    extra = {"base_model.model.lm.layers.1.q_proj.lora_A.weight": np.ones((2, 4), "f4")}
    write_adapter(tmp_path / "adapter", LAYERS[:1], tensors=extra)
    error = failure(tmp_path)
    assert_error(error, "adapter.incomplete", ": 1 ")
    assert str(error).endswith(": 'lm.layers.1.q_proj.lora_A'")


def test_a_prefix_finds_the_part_that_was_trained(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["layers.0.q_proj", "layers.1.q_proj"])
    tensors = merged(base(tmp_path), adapter=tmp_path / "adapter", prefixes=["", "x.", "lm."])
    assert tensors[f"{LAYERS[1]}.weight"].numpy().max() > 1


def test_several_fitting_prefixes_are_ambiguous(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["q_proj"])
    error = failure(tmp_path, prefixes=["vision.", "lm.layers.0.", "vision."])
    facts = ("2", "'q_proj.weight'", "'vision.q_proj.weight'", "'lm.layers.0.q_proj.weight'")
    assert_error(error, "adapter.ambiguous", *facts)


def test_no_prefix_at_all_fits(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", ["other.q_proj"])
    error = failure(tmp_path, prefixes=["a.", "b."])
    assert_error(error, "adapter.not-of-this-model", "1 of 1", "'other.q_proj.weight'")


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
    facts = (" 1 ", "target_modules", ": 'lm.layers.1.q_proj")
    assert_error(failure(tmp_path), "adapter.incomplete", *facts)


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
    ("settings", "code", "facts"),
    [
        ({"peft_type": "ADALORA"}, NOT_PLAIN, 'peft_type="ADALORA" (supported: "LORA")'),
        ({"bias": "all"}, NOT_PLAIN, 'bias="all" (supported: "none")'),
        ({"r": "8"}, NOT_PLAIN, ("r:", "int", 1, '"8"')),
        ({"r": 0}, NOT_PLAIN, ("r:", "int", 1, "got 0")),
        ({"lora_alpha": None}, NOT_PLAIN, ("lora_alpha:", "finite", "null")),
        ({"rank_pattern": {"q_proj": 0}}, WRONG, ("rank_pattern:", "'q_proj'", "number", 0)),
        ({"rank_pattern": {"q_proj": 2.0}}, WRONG, ("rank_pattern:", "'q_proj'", "number", 2.0)),
        ({"alpha_pattern": {"q_proj": "1"}}, WRONG, ("alpha_pattern:", "'q_proj'", "'1'")),
        ({"rank_pattern": {"(": 2}}, WRONG, ("rank_pattern:", "'('", "regular expression")),
        ({"rank_pattern": [1]}, NOT_PLAIN, ("rank_pattern:", "object", "null", [1])),
        ({"use_dora": True}, NOT_PLAIN, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, NOT_PLAIN, "modules_to_save=['lm_head']"),
        ({"target_parameters": ["w"]}, NOT_PLAIN, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, NOT_PLAIN, "layer_replication"),
        ({"use_qalora": True}, NOT_PLAIN, "use_qalora"),
        ({"invented_later": {"a": 1}, "use_bdlora": {}, "kasa_config": {"a": 1}}, NOT_PLAIN,
         ": invented_later={'a': 1}, kasa_config={'a': 1}"),
        ({"init_lora_weights": "pissa_niter_16"}, NOT_PLAIN, "'pissa_niter_16'"),
        ({"init_lora_weights": "loftq"}, NOT_PLAIN, "'loftq'"),
        ({"init_lora_weights": "new"}, NOT_PLAIN, "init_lora_weights='new'"),
        ({"init_lora_weights": ["x"]}, NOT_PLAIN, "init_lora_weights=['x']"),
    ],
)  # fmt: skip
def test_settings_that_are_not_plain_lora_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], code: str, facts: str | tuple[object, ...]
) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS, **settings)
    held = (facts,) if isinstance(facts, str) else facts
    assert_error(failure(tmp_path), code, folder / "adapter_config.json", *held)


def test_no_peft_type(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS)
    write_json(folder / "adapter_config.json", {"r": 2})
    assert_error(failure(tmp_path), NOT_PLAIN, "adapter_config.json", "'peft_type'")


@pytest.mark.parametrize(
    ("stored", "code", "expected"),
    [
        ({"base_model.model.merger.weight": 1}, "adapter.other-weights", ": 'merger.weight'"),
        ({"base_model.model.lm_head.bias": 1}, "adapter.other-weights", ": 'lm_head.bias'"),
        ({"base_model.model.lm_head.weight": 1}, "adapter.not-of-this-model", "'lm_head.weight'"),
        ({f"base_model.model.{LAYERS[0]}.lora_magnitude_vector": 1}, NOT_PLAIN, "lora_magnitude_v"),
        ({f"base_model.model.{LAYERS[0]}.lora_B.bias": 1}, NOT_PLAIN, "lora_B.bias"),
    ],
)
def test_tensors_that_are_not_pairs(
    tmp_path: Path, stored: dict[str, int], code: str, expected: str
) -> None:
    tensors = {name: np.ones(3, "f4") for name in stored}
    write_adapter(tmp_path / "adapter", LAYERS, tensors=tensors)
    assert_error(failure(tmp_path), code, expected)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    assert_error(failure(tmp_path), "source.missing-file", settings)
    settings.write_text("{,}")
    assert_error(failure(tmp_path), "source.not-json", settings, "line 1")
    write_json(settings, SETTINGS)
    assert_error(failure(tmp_path), "adapter.no-weights", folder, "adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"x")
    error = failure(tmp_path)
    assert_error(error, "adapter.pickled", "adapter_model.bin", "adapter_model.safetensors")
    assert "safe_serialization=True" in (error.hint or "")
    weights.write_bytes(b"")
    assert_error(failure(tmp_path), "weights.unreadable", weights, "0 bytes")
    save_file({}, weights)
    assert_error(failure(tmp_path), "adapter.incomplete", weights)


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
