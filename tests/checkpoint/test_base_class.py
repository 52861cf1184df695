"""What transformers itself loads is exported: models saved from their base class, a tied matrix
under either of its names, buffers that older versions stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForImageTextToText

from tests.checkpoints import write_prefix_checkpoint, write_weights
from tests.errors import raises
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from vlmport.checkpoint import Checkpoint, LazyTensor
from vlmport.errors import WeightError
from vlmport.exporter import export
from vlmport.families import family_of

ANSWERING: dict[str, Callable[[Path], Path]] = {
    "idefics3": lambda folder: write_idefics3_checkpoint(folder, config=TIED),
    "smolvlm": lambda folder: write_idefics3_checkpoint(
        folder, model_type="smolvlm", spelling="v5", config=TIED
    ),
    "qwen2_5": lambda folder: write_qwen2_5(folder, config=TIED),
    "qwen3": lambda folder: write_qwen3(folder, config=TIED),
}
TIED = {"tie_word_embeddings": True}
BUFFERS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.vision_model.embeddings.position_ids",
    "visual.rotary_pos_emb.inv_freq",
    "model.language_model.rotary_emb.original_inv_freq",
)


def weights_of(folder: Path) -> dict[str, LazyTensor]:
    checkpoint = Checkpoint.open(folder)
    return dict(family_of(checkpoint).weights(checkpoint, None))


def assert_same_weights(folder: Path, expected: Path) -> None:
    ours, theirs = weights_of(folder), weights_of(expected)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].numpy(), tensor.numpy(), err_msg=name)


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write_weights(folder, tensors)
    return folder


def loads_whole(folder: Path) -> Any:
    """The model as transformers loads it, which misses nothing."""
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model


def write_again(folder: Path, family: str, save: Callable[[Path], Any]) -> Path:
    """The same checkpoint, its weights as `save` writes them."""
    ANSWERING[family](folder)
    (folder / "model.safetensors").unlink()
    save(folder.parent / "saved")
    (folder.parent / "saved" / "model.safetensors").rename(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", ANSWERING)
def test_a_model_saved_from_its_base_class(family: str, tmp_path: Path) -> None:
    whole = ANSWERING[family](tmp_path / "whole")
    base = AutoModel.from_pretrained(whole)
    folder = write_again(tmp_path / "base", family, base.save_pretrained)
    assert not any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    loads_whole(folder)
    assert_same_weights(folder, whole)


@pytest.mark.parametrize("family", ANSWERING)
def test_a_tied_matrix_stored_as_the_head_alone(family: str, tmp_path: Path) -> None:
    whole = ANSWERING[family](tmp_path / "whole")

    def rename(tensors: dict[str, np.ndarray]) -> None:
        (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
        tensors["lm_head.weight"] = tensors.pop(name)

    folder = change(ANSWERING[family](tmp_path / "head"), rename)
    model = loads_whole(folder)
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, weights_of(folder)["lm_head.weight"].numpy())
    assert_same_weights(folder, whole)


def test_a_captioner_whose_decoder_is_a_base_class(tmp_path: Path) -> None:
    whole = write_prefix_checkpoint(tmp_path / "whole", lora=False)

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("language_model.model.")]:
            tensors[name.replace(".model.", ".", 1)] = tensors.pop(name)

    folder = change(write_prefix_checkpoint(tmp_path / "base", lora=False), rename)
    assert_same_weights(folder, whole)
    export(folder, tmp_path / "out", precisions="q8")


def test_buffers_of_older_versions_are_no_weights(tmp_path: Path) -> None:
    folder = write_qwen2_5(tmp_path / "qwen", config=TIED)
    expected = sorted(weights_of(folder))
    change(folder, lambda tensors: tensors.update(dict.fromkeys(BUFFERS, np.zeros(4, "f4"))))
    assert sorted(weights_of(folder)) == expected


def test_a_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "qwen")
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with raises(WeightError, "weights.unset", "lm_head"):
        export(folder, tmp_path / "out", precisions="fp32")
