"""What is merged equals peft's own merge_and_unload(), for every kind of adapter that we take."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints import write_weights
from tests.errors import raises
from vlmport.checkpoint import LoraScale, Weights, merged
from vlmport.checkpoint.adapter import Adapter
from vlmport.errors import AdapterError

# peft's own warnings on transformers' deprecations, and on what it saves
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module"),
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """peft looks for the base model on the Hub when it saves; the answer does not matter here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=31,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


class Whole(torch.nn.Module):
    """A model that has a language model among its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = llama()
        self.vision = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32)})


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


def adapt(model: torch.nn.Module, config: LoraConfig) -> PeftModel:
    """The model with LoRA whose A and B are both random."""
    peft = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft


def assert_merged(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> None:
    """Equal within the rounding of a float32 sum of r products and a weight."""
    assert set(ours) == set(theirs)
    changed = 0
    for name, expected in theirs.items():
        got = ours[name].numpy()
        assert got.dtype == np.float32
        scale = np.abs(expected).max() + (np.abs(expected - ours[name].base_values).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=4 * np.finfo("f4").eps * scale)
        changed += ours[name].is_merged
    assert changed


class Probe:
    """A merged tensor together with what it was before."""

    def __init__(self, tensor: Any):
        base = getattr(tensor, "base", tensor)
        self.numpy = tensor.numpy
        self.base_values = base.numpy()
        self.is_merged = base is not tensor and bool((tensor.numpy() != self.base_values).any())


def probes(tensors: Mapping[str, Any]) -> dict[str, Probe]:
    return {name: Probe(tensor) for name, tensor in tensors.items()}


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION},
    "alpha = r": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION},
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "regex target": {"r": 3, "lora_alpha": 5, "target_modules": r".*layers\.1\..*(up|q)_proj"},
    "some layers": {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "excluded": {"r": 2, "target_modules": ["v_proj"], "exclude_modules": r".*layers\.0\..*"},
    "ranks": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ATTENTION,
        "rank_pattern": {"k_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11, "(q|v)_proj": 3},
    },
    "overlapping patterns": {
        "r": 4,
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 5, ".*o_proj": 9},
        "alpha_pattern": {r".*v_.*": 1, ".*q_proj": 2},
    },
    "a pattern that is only the end of a name": {
        "r": 4,
        "target_modules": ATTENTION,
        "rank_pattern": {"proj": 9, "k_proj": 3},
        "alpha_pattern": {"_proj": 9},
    },
    "rslora with patterns": {
        "r": 4,
        "target_modules": ATTENTION,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "random": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False},
    "half alpha": {"r": 4, "lora_alpha": 0.5, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_a_peft_folder_on_a_llama(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Compared with what peft loads: saving sorts the patterns, and the first that matches wins."""
    model = llama()
    write_weights(tmp_path, arrays(model))
    base = copy.deepcopy(model)
    peft = adapt(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    peft.save_pretrained(tmp_path / "adapter")
    ours = merged(Weights.open(tmp_path), adapter=tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_merged(probes(ours), arrays(loaded.merge_and_unload()))


def test_fan_in_fan_out_is_not_of_a_linear_layer(tmp_path: Path) -> None:
    """peft resets it there. A square matrix got its update transposed, and nobody was told."""
    model = llama()
    write_weights(tmp_path, arrays(model))
    base = copy.deepcopy(model)
    adapt(model, LoraConfig(r=3, target_modules=ATTENTION)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": True}))
    ours = merged(Weights.open(tmp_path), adapter=tmp_path / "adapter")
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_merged(probes(ours), arrays(loaded.merge_and_unload()))


@pytest.mark.parametrize("rslora", [False, True])
def test_pairs_inside_the_checkpoint(tmp_path: Path, rslora: bool) -> None:
    """The whole state dict of a wrapped model, saved under PEFT's names, as distilvit2 does."""
    model = Whole()
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=ATTENTION)
    model.language_model = adapt(model.language_model, config)  # type: ignore[assignment]
    write_weights(tmp_path, arrays(model), shards=2)
    weights = Weights.open(tmp_path)
    assert len(weights.pairs) == 8
    ours = merged(weights, lora=LoraScale(r=4, alpha=12, rslora=rslora))
    model.language_model = model.language_model.merge_and_unload()  # type: ignore[operator]
    assert_merged(probes(ours), arrays(model))


def test_an_adapter_of_the_language_model_alone(tmp_path: Path) -> None:
    model = Whole()
    write_weights(tmp_path, arrays(model))
    config = LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM")
    model.language_model = adapt(model.language_model, config)  # type: ignore[assignment]
    model.language_model.save_pretrained(tmp_path / "adapter")
    ours = merged(
        Weights.open(tmp_path),
        adapter=tmp_path / "adapter",
        prefixes=("", "language_model.", "text_model."),
    )
    model.language_model = model.language_model.merge_and_unload()  # type: ignore[operator]
    assert_merged(probes(ours), arrays(model))


def test_an_adapter_of_the_whole_model_onto_renamed_weights(tmp_path: Path) -> None:
    model = Whole()
    write_weights(tmp_path, arrays(model))
    peft = adapt(model, LoraConfig(r=4, target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path / "adapter")

    def rename(name: str) -> str:
        return name.replace("language_model.model.", "text.")

    ours = merged(Weights.open(tmp_path), rename=rename, adapter=tmp_path / "adapter")
    theirs = arrays(peft.merge_and_unload())
    assert_merged(probes(ours), {rename(name): value for name, value in theirs.items()})


def test_an_adapter_on_top_of_pairs_inside(tmp_path: Path) -> None:
    model = llama()
    inner = adapt(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    write_weights(tmp_path, arrays(inner))
    base = inner.merge_and_unload()
    outer = adapt(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    outer.save_pretrained(tmp_path / "adapter")
    ours = merged(
        Weights.open(tmp_path), lora=LoraScale(r=2, alpha=4), adapter=tmp_path / "adapter"
    )
    assert_merged(probes(ours), arrays(outer.merge_and_unload()))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, 'bias="all" (supported: "none")'),
        ({"bias": "lora_only"}, 'bias="lora_only" (supported: "none")'),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    ],
)
def test_what_peft_saves_and_we_do_not_merge_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    model = llama()
    write_weights(tmp_path, arrays(model))
    peft = adapt(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))
    peft.save_pretrained(tmp_path / "adapter")
    with raises(AdapterError, "adapter.not-plain-lora", expected) as caught:
        Adapter.open(tmp_path / "adapter")
    assert caught.value.hint


def test_embedding_adapters_are_refused(tmp_path: Path) -> None:
    peft = adapt(llama(), LoraConfig(r=4, target_modules=["embed_tokens"]))
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    with raises(AdapterError, "adapter.not-plain-lora", "lora_embedding_A"):
        Adapter.open(tmp_path)
