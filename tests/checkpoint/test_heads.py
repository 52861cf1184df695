"""Head and embedding are what transformers makes of a checkpoint, whatever config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.errors import raises
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.checkpoint import Checkpoint
from vlmport.checkpoint.head import HeadNames, same_values
from vlmport.checkpoint.weights import open_safetensors
from vlmport.errors import CheckpointWarning, WeightError
from vlmport.exporter import export
from vlmport.families import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]
Write = Callable[..., Path]


def smolvlm(folder: Path, **settings: Any) -> Path:
    return write_idefics3_checkpoint(folder, model_type="smolvlm", **settings)


FAMILIES: dict[str, Write] = {
    "idefics3": write_idefics3_checkpoint,
    "smolvlm": smolvlm,
    "qwen2_5": write_qwen2_5,
    "qwen3": write_qwen3,
}
# case → (tied, what is stored, whether it is said that the stored head counts)
CASES: dict[str, tuple[bool, str, bool]] = {
    "tied, a head of its own": (True, "both", True),
    "tied, the same twice": (True, "twice", False),
    "untied": (False, "both", False),
}


def edit(folder: Path, stored: str, config: Mapping[str, Any]) -> Path:
    """Leave of embedding and head what the case stores, and set keys of config.json."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    if stored == "twice":
        tensors["lm_head.weight"] = tensors[table].copy()
    elif stored == "head":
        del tensors[table]
    elif stored == "embedding":
        del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**raw, **config})
    return folder


def theirs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head as transformers loads them."""
    kind: Any = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32)
    both = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (layer.weight.detach().numpy() for layer in both)
    return embedding, head


def assert_as_theirs(folder: Path, *, tied: bool) -> None:
    """The two matrices, and whether the family and the bundle's config.json tie them."""
    checkpoint = Checkpoint.open(folder)
    family: Any = family_of(checkpoint)
    tensors = family.weights(checkpoint, None)
    family = family.with_weights(tensors)
    embedding, head = theirs(folder)
    np.testing.assert_array_equal(tensors[family.head.embedding].numpy(), embedding)
    np.testing.assert_array_equal(tensors[family.head.head].numpy(), head)
    config = family.hub_files().config
    told = config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    assert (*told, family.text.tie_word_embeddings) == (tied,) * 3


@pytest.mark.parametrize("write", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("tied", "stored", "said"), CASES.values(), ids=CASES)
def test_the_tensors_count_before_the_flag(
    tmp_path: Path, write: Write, tied: bool, stored: str, said: bool
) -> None:
    folder = edit(write(tmp_path / "c"), stored, {"tie_word_embeddings": tied})
    if not said:
        assert_as_theirs(folder, tied=tied)
        return
    with pytest.warns(CheckpointWarning, match=r"'lm_head\.weight'") as caught:
        assert_as_theirs(folder, tied=False)
    assert [one.message.code for one in caught] == ["checkpoint.head-differs"]


@pytest.mark.parametrize("stored", ["twice", "head", "embedding"])
def test_qwen2_5_is_tied_by_its_text_config_too(tmp_path: Path, stored: str) -> None:
    folder = write_qwen2_5(tmp_path / "c", spelling="v5", text={"tie_word_embeddings": True})
    assert_as_theirs(edit(folder, stored, {"tie_word_embeddings": False}), tied=True)


def test_what_peft_merges_of_a_tied_model_with_a_trained_head(tmp_path: Path) -> None:
    """peft writes the outer flag false, leaves text_config's true, and saves both matrices."""
    tied = {"tie_word_embeddings": True}
    folder = write_qwen2_5(tmp_path / "c", spelling="v5", config=tied, text=tied)
    kind: Any = transformers.AutoModelForImageTextToText
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft: Any = get_peft_model(kind.from_pretrained(folder), settings)
    with torch.no_grad():
        peft.get_output_embeddings().weight[:] += 0.5
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        model = peft.merge_and_unload()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"]) == (False, True)
    with pytest.warns(CheckpointWarning):
        assert_as_theirs(folder, tied=False)


def test_an_untied_head_that_is_missing_stays_an_error(tmp_path: Path) -> None:
    folder = edit(write_qwen3(tmp_path / "c"), "embedding", {"tie_word_embeddings": False})
    with raises(WeightError, "weights.unset", "lm_head.weight"):
        export(folder, tmp_path / "bundle", precisions="fp32")


def test_a_captioner_with_a_head_of_its_own(tmp_path: Path) -> None:
    """Its components layout shares one matrix between the two where they are tied."""
    folder = write_prefix_checkpoint(tmp_path / "c", text={"tie_word_embeddings": False})
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["text_config"]["tie_word_embeddings"] = True
    write_json(folder / "config.json", raw)
    with pytest.warns(CheckpointWarning, match="tie_word_embeddings"):
        bundle = export(folder, tmp_path / "b", precisions="fp32", layout="components")
    written = json.loads((bundle.folder / "config.json").read_text(encoding="utf-8"))
    assert written["text_config"]["tie_word_embeddings"] is False
    untied = write_prefix_checkpoint(tmp_path / "u", text={"tie_word_embeddings": False})
    same = export(untied, tmp_path / "s", precisions="fp32", layout="components")
    assert bundle.manifest.golden == same.manifest.golden


def test_matrices_are_compared_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmport.checkpoint.head.BLOCK", 4)
    values = np.arange(10, dtype="f4").reshape(5, 2)
    last, zero = values.copy(), values.copy()
    last[4, 1], zero[0, 0] = 0, -0.0
    stored = {"a": values, "b": values.copy(), "last": last, "zero": zero, "half": values}
    stored["half"], stored["row"] = values.astype("f2"), values[:4]
    save_file(stored, tmp_path / "x.safetensors")
    tensors = open_safetensors(tmp_path / "x.safetensors")
    same = {name for name in tensors if same_values(tensors["a"], tensors[name])}
    assert same == {"a", "b", "zero", "half"}
    assert HeadNames("a", "last", tied=False).resolve(tensors) == tensors
