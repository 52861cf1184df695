"""Every file of the folders given is accounted for: read, known to be harmless, or named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.errors import raises
from tests.exporter.test_same_model import write_adapter
from vlmport.checkpoint import Checkpoint, locate, locate_adapter
from vlmport.checkpoint.folders import check_adapter
from vlmport.errors import CheckpointWarning, SourceError
from vlmport.exporter import export

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
MODEL = {"config.json", "model.safetensors"}
BASE = "org/the-base"


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "adapter_config.json":
            write_json(path, {"base_model_name_or_path": BASE})
        else:
            path.write_text("{}")
    return folder


HARMLESS: dict[str, set[str]] = {
    "nothing else": set(),
    "what the Trainer keeps": {
        "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin",
        "rng_state.pth", "rng_state_0.pth", "README.md", "config.json", "runs/x/events.out",
    },
    "what accelerate and DeepSpeed keep": {
        "optimizer.bin", "random_states_0.pkl", "scheduler.bin", "sampler.bin", "latest",
        "global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    },
    "earlier steps": {"checkpoint-500/adapter_model.safetensors", "checkpoint-500/optimizer.pt"},
    "another adapter": {"second/adapter_config.json", "second/adapter_model.safetensors"},
    "the merged model": {"merged/config.json", "merged/model.safetensors"},
    "the same, pickled": {"adapter_model.bin"},
}  # fmt: skip


@pytest.mark.parametrize("names", HARMLESS.values(), ids=HARMLESS)
def test_an_adapter_with_what_is_usual_beside_it(tmp_path: Path, names: set[str]) -> None:
    assert locate_adapter(make(tmp_path, *ADAPTER, *names)) == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_state_dict.bin",
        "non_lora_trainables.bin",
        "mm_projector.bin",
        "merger.safetensors",
        "merger/model.safetensors",
        "connector.pt",
        "CONNECTOR.BIN",
        "projector.npy",
        "model.safetensors",
        "pytorch_model.bin",
    ],
)
def test_weights_beside_an_adapter_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """A merger that was trained whole, for one: without it the adapter is wrong."""
    make(tmp_path, *ADAPTER, "optimizer.pt", name)
    with pytest.raises(SourceError) as caught:
        locate_adapter(tmp_path)
    assert caught.value.code == "adapter.other-weights"
    assert repr(name) in str(caught.value)
    assert "optimizer" not in str(caught.value)
    assert "merge_and_unload" in (caught.value.hint or "")


def test_they_are_refused_at_export(tmp_path: Path, tiny_checkpoint: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    make(adapter, "non_lora_state_dict.bin")
    with raises(SourceError, "adapter.other-weights", "non_lora_state_dict"):
        export(tiny_checkpoint, tmp_path / "bundle", adapter=adapter)


@pytest.mark.parametrize(
    "adapter", [ADAPTER, {"adapter_config.json"}, {"adapter_model.bin"}, {*ADAPTER, "x.bin"}]
)
@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_model_and_an_adapter_in_one_folder(
    tmp_path: Path, adapter: set[str], weights: str
) -> None:
    """transformers loads both, the export would take one: which is meant has to be said."""
    make(tmp_path, "config.json", weights, *adapter)
    with pytest.raises(SourceError) as caught:
        locate(tmp_path)
    assert caught.value.code == "source.adapter-beside-model"
    assert "--adapter" in (caught.value.hint or "")
    if len(adapter) > 1 and weights == "model.safetensors":
        with pytest.raises(SourceError) as caught:
            locate_adapter(tmp_path)
        assert caught.value.code == "adapter.other-weights"
        assert "folder of their own" in (caught.value.hint or "") or "x.bin" in adapter


# what a trainer leaves → the folder that the hint gives as --adapter, below it
OUTPUTS: dict[str, tuple[set[str], str]] = {
    "an adapter": (ADAPTER, ""),
    "and the config": ({*ADAPTER, "config.json", "training_args.bin"}, ""),
    "pickled": ({"adapter_config.json", "adapter_model.bin", "config.json"}, ""),
    "adapters in subfolders": (
        {f"checkpoint-{n}/{name}" for n in (500, 1000) for name in ADAPTER} | {"config.json"},
        "checkpoint-1000",
    ),
    "without a config": (
        {f"checkpoint-{n}/{name}" for n in (999, 1000) for name in (*ADAPTER, "config.json")},
        "checkpoint-1000",
    ),
}


@pytest.mark.parametrize(("names", "inner"), OUTPUTS.values(), ids=OUTPUTS)
def test_a_trainers_output_is_known(tmp_path: Path, names: set[str], inner: str) -> None:
    make(tmp_path, *names)
    with pytest.raises(SourceError) as caught:
        locate(tmp_path)
    assert caught.value.code == "source.is-adapter"
    assert BASE in (caught.value.hint or "")
    assert (caught.value.hint or "").endswith(f"--adapter {tmp_path / inner}")


def test_whole_models_in_subfolders(tmp_path: Path) -> None:
    make(tmp_path, "config.json", *(f"checkpoint-{n}/{x}" for n in (20, 100) for x in MODEL))
    with pytest.raises(SourceError) as caught:
        locate(tmp_path)
    assert caught.value.code == "source.in-subfolder"
    assert (caught.value.hint or "").endswith(f" {tmp_path / 'checkpoint-100'}")


def test_a_subfolder_that_was_not_fetched_is_not_given_as_a_path(tmp_path: Path) -> None:
    """Of a repository on the Hub only the files at its root are here."""
    with pytest.raises(SourceError) as caught:
        check_adapter(tmp_path, ["README.md", *(f"checkpoint-20/{x}" for x in ADAPTER)])
    assert caught.value.code == "adapter.in-subfolder"
    assert str(tmp_path) not in (caught.value.hint or "")
    assert (caught.value.hint or "").endswith("checkpoint-20")


def test_an_adapter_in_a_subfolder_or_pickled(tmp_path: Path) -> None:
    make(tmp_path, "config.json", *(f"checkpoint-{n}/{x}" for n in (20, 100) for x in ADAPTER))
    with pytest.raises(SourceError) as caught:
        locate_adapter(tmp_path)
    assert caught.value.code == "adapter.in-subfolder"
    assert (caught.value.hint or "").endswith(f" {tmp_path / 'checkpoint-100'}")
    make(tmp_path / "old", "adapter_config.json", "adapter_model.bin")
    with raises(SourceError, "adapter.pickled") as caught:
        locate_adapter(tmp_path / "old")
    assert caught.value.code == "adapter.pickled"
    with pytest.raises(SourceError) as caught:
        locate_adapter(make(tmp_path / "model", *MODEL))
    assert caught.value.code == "adapter.no-config"
    assert "without --adapter" in (caught.value.hint or "")


USUAL = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.safetensors",
    "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.Q4_K_M.gguf",
    "onnx/model.onnx", "model.fp16.safetensors", "optimizer.pt", "training_args.bin",
    "rng_state.pth", "original/consolidated.00.pth", "openvino_model.bin", "vocab.json",
)  # fmt: skip
UNREAD = ("model-00001-of-00002.safetensors", "mm_projector.bin", "merger.safetensors", "x.pt")


@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_checkpoint_holds_beside_its_weights(tmp_path: Path, shards: int) -> None:
    """The same weights for other programs make no noise; what nobody reads is named."""
    folder = make(write_prefix_checkpoint(tmp_path, shards=shards), *USUAL)
    Checkpoint.open(folder)
    unread = UNREAD if shards == 1 else ("model-00003-of-00003.safetensors", *UNREAD[1:])
    make(folder, *unread)
    with pytest.warns(CheckpointWarning) as caught:
        Checkpoint.open(folder)
    (warning,) = (one.message for one in caught)
    assert isinstance(warning, CheckpointWarning)
    assert warning.code == "checkpoint.file-ignored"
    assert all(repr(name) in str(warning) for name in unread)
    assert not any(repr(name) in str(warning) for name in USUAL)
