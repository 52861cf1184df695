"""LoRA on heads, embeddings' copies and convolutions: what peft's loaded model computes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from tests.errors import raises
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.checkpoint import Checkpoint
from vlmport.errors import AdapterError, CheckpointWarning
from vlmport.families import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
TIED: dict[str, Any] = {"config": {"tie_word_embeddings": True}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def load(folder: Path) -> Any:
    kind: Any = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32)


def adapt(folder: Path, *targets: str, trained: float = 0, **options: Any) -> Path:
    """Train random LoRA, and add to the embedding where `trained`; returns the adapter's folder."""
    peft = get_peft_model(load(folder), LoraConfig(r=3, lora_alpha=5, target_modules=[*targets]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        base: Any = peft.get_base_model()
        base.get_input_embeddings().weight += trained
    adapter = folder.parent / "adapter"
    peft.save_pretrained(str(adapter), **options)
    return adapter


def effective(module: Any) -> np.ndarray:
    """The weight that a module of peft's model works with, nothing merged."""
    weight = module.weight
    for name in getattr(module, "active_adapters", ()):
        weight = weight + module.get_delta_weight(name)
    return weight.detach().numpy()


def assert_as_theirs(folder: Path, adapter: Path, kernel: str = "") -> None:
    """Embedding, head, and the convolution that the family knows by this name."""
    checkpoint = Checkpoint.open(folder)
    family: Any = family_of(checkpoint)
    tensors = family.weights(checkpoint, adapter)
    model: Any = PeftModel.from_pretrained(load(folder), str(adapter)).get_base_model()
    theirs = {
        family.head.embedding: effective(model.get_input_embeddings()),
        family.head.head: effective(model.get_output_embeddings()),
    }
    if kernel:
        path = next(path for path, _ in model.named_modules() if path.endswith(kernel))
        theirs[next(name for name in tensors if name.endswith(f"{kernel}.weight"))] = effective(
            model.get_submodule(path)
        )
    for name, expected in theirs.items():
        got = tensors[name].numpy()
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6)
    tied = np.array_equal(*list(theirs.values())[:2])
    assert family.with_weights(tensors).text.tie_word_embeddings is (family.head.tied and tied)


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("write", [write_idefics3_checkpoint, write_qwen2_5, write_qwen3])
def test_on_the_head_as_peft_saves_it(tmp_path: Path, write: Any, settings: Any) -> None:
    """With a copy of the base's head, which says nothing new. A tied embedding stays as it was."""
    folder = write(tmp_path / "c", **settings)
    adapter = adapt(folder, "q_proj", "lm_head")
    assert any("lm_head.base_layer" in n for n in load_file(adapter / "adapter_model.safetensors"))
    assert_as_theirs(folder, adapter)


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
def test_a_trained_embedding_in_the_adapters_file_counts(tmp_path: Path, settings: Any) -> None:
    folder = write_qwen3(tmp_path / "c", **settings)
    adapter = adapt(folder, "q_proj", trained=0.25, save_embedding_layers=True)
    with pytest.warns(CheckpointWarning, match="embed_tokens") as caught:
        assert_as_theirs(folder, adapter)
    codes = {one.message.code for one in caught if isinstance(one.message, CheckpointWarning)}
    assert codes == {"adapter.embedding-replaced"}


def test_a_trained_head_under_its_pair_counts(tmp_path: Path) -> None:
    """In a tied model it is the embedding too: peft writes into the one parameter."""
    folder = write_qwen3(tmp_path / "c", **TIED)
    adapter = adapt(folder, "lm_head", trained=0.25)
    with pytest.warns(CheckpointWarning, match="lm_head"):
        assert_as_theirs(folder, adapter)


def test_a_head_that_peft_would_not_load_is_refused(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "c")
    adapter = adapt(folder, "lm_head", trained=0)
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    name = "base_model.model.lm_head"
    head = stored.pop(f"{name}.base_layer.weight")
    save_file({**stored, f"{name}.weight": head}, file)
    assert_as_theirs(folder, adapter)
    save_file({**stored, f"{name}.weight": head + 1}, file)
    with raises(AdapterError, "adapter.other-weights", "lm_head.weight"):
        assert_as_theirs(folder, adapter)
    save_file({**stored, f"{name}.base_layer.weight": np.pad(head, ((0, 2), (0, 0)))}, file)
    with raises(AdapterError, "adapter.other-rows", f"[{len(head) + 2}, 32]") as caught:
        assert_as_theirs(folder, adapter)
    assert f"resize_token_embeddings({len(head) + 2})" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("write", "kernel"),
    [
        (write_idefics3_checkpoint, "embeddings.patch_embedding"),  # Conv2d
        (write_qwen2_5, "patch_embed.proj"),  # Conv3d
        (write_qwen3, "patch_embed.proj"),
    ],
)
def test_on_the_patch_embedding(tmp_path: Path, write: Any, kernel: str) -> None:
    folder = write(tmp_path / "c", **({"spelling": "v5"} if write is write_qwen2_5 else {}))
    adapter = adapt(folder, kernel.rpartition(".")[2], "q_proj")
    assert_as_theirs(folder, adapter, kernel)
