"""Qwen3-VL: every published dense size, what is read of a checkpoint, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoints import write_json
from tests.errors import raises
from tests.qwen_checkpoints import write_qwen3
from tests.shared_testdata import shared_testdata
from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError
from vlmport.families import family_of
from vlmport.families.qwen_vl.family import QwenVL
from vlmport.families.qwen_vl.qwen3 import Qwen3VL
from vlmport.graph.parameters import Weight
from vlmport.graph.precision import PRECISIONS

CONFIGS = shared_testdata("configs")
ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
# What distinguishes the sizes that Qwen publishes; 2B and 4B share a smaller tower. Sources: the
# configs of 2B and 4B, which are in the shared test data; for 8B pytorch/torchtitan,
# experiments/qwen3_vl/__init__.py (0375bb6); 32B is MiniMax-H3's text encoder as it was published,
# whose ports state its config.json, and the tensors and bytes of its files, in TENSORS.
SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
Size = tuple[dict[str, Any], list[int], dict[str, Any], bool]
SIZES: dict[str, Size] = {
    "2B": (SMALL, [5, 11, 17], {"hidden_size": 2048, "num_attention_heads": 16}, True),
    "4B": (SMALL, [5, 11, 17], {"hidden_size": 2560, "num_attention_heads": 32}, True),
    "8B": (LARGE, [8, 16, 24], {"hidden_size": 4096, "num_attention_heads": 32}, False),
    "32B": (LARGE, [8, 16, 24], {"hidden_size": 5120, "num_attention_heads": 64}, False),
}
TENSORS, BYTES = 1058, 66_714_912_872  # of 32B: in bfloat16, with the headers of 14 files
LAYERS = {"2B": (28, 6144), "4B": (36, 9728), "8B": (36, 12288), "32B": (64, 25600)}


def read(folder: Path, **settings: Any) -> Qwen3VL:
    family = family_of(Checkpoint.open(write_qwen3(folder, **settings)))
    assert type(family) is Qwen3VL
    return family


def of_size(name: str) -> dict[str, Any]:
    """The config.json of that size."""
    tower, lanes, text, tied = SIZES[name]
    layers, inner = LAYERS[name]
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "tie_word_embeddings": tied,
        "vision_config": {
            **tower,
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": lanes,
            "out_hidden_size": text["hidden_size"],
            "num_heads": 16,
        },
        "text_config": {
            **text,
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": inner,
            "rope_theta": 5000000,
            "rope_scaling": ROPE,
            "vocab_size": 151936,
        },
    }


def wanted(family: QwenVL, precision: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that the graphs ask for, with its shape."""
    return {
        key: source.shape
        for builder in family.graphs(PRECISIONS[precision]).values()
        for value in builder.graph.initializers.values()
        if isinstance(value, Weight)
        for key, source in zip(value.keys, value.sources, strict=True)
    }


@pytest.mark.parametrize("precision", ["fp32", "q4f16"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_asks_for_the_tensors_that_transformers_has(
    tmp_path: Path, size: str, precision: str
) -> None:
    raw = of_size(size)
    settings = transformers.Qwen3VLConfig(**json.loads(json.dumps(raw)))
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(settings)
    truth = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): shape
        for name, shape in ((name, tuple(one.shape)) for name, one in model.state_dict().items())
    }
    family = read(tmp_path / "model")
    vision = type(family).read_vision(raw["vision_config"], "config.json: vision_config")
    text = type(family).read_text(raw["text_config"], vision, "config.json: text_config")
    assert wanted(dataclasses.replace(family, vision=vision, text=text), precision) == truth
    tied = raw["tie_word_embeddings"]
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape
    assert (model.config.tie_word_embeddings is True) == tied
    if size == "32B":
        stored = 2 * sum(math.prod(shape) for shape in truth.values())
        assert len(truth) == TENSORS
        assert 0 < BYTES - stored < 14 * 20_000


@pytest.mark.skipif(CONFIGS is None, reason="no shared test data")
@pytest.mark.parametrize("size", ["2B", "4B"])
def test_the_published_configs_are_those_sizes(size: str) -> None:
    assert CONFIGS is not None
    path = CONFIGS / f"Qwen3-VL-{size}-Instruct" / "config.json"
    raw, ours = json.loads(path.read_text(encoding="utf-8")), of_size(size)
    for section in ("vision_config", "text_config"):
        assert {key: raw[section][key] for key in ours[section]} == ours[section]
    assert {key: raw[key] for key in ours if not key.endswith("_config")} == {
        key: value for key, value in ours.items() if not key.endswith("_config")
    }


def test_both_spellings_are_one_model(tmp_path: Path) -> None:
    old, new = (read(tmp_path / name, spelling=name) for name in ("v4", "v5"))
    for field in dataclasses.fields(Qwen3VL):
        if field.name != "raw":
            assert getattr(old, field.name) == getattr(new, field.name), field.name
    assert old.text.deepstack_lanes == 2
    assert old.text.embeds_size == 3 * old.text.hidden_size
    assert old.text.head_size != old.text.hidden_size // old.text.heads


def test_absent_keys_mean_what_hugging_face_means_by_them(tmp_path: Path) -> None:
    truth = transformers.Qwen3VLConfig()
    vision = Qwen3VL.read_vision({}, "vision_config")
    text = Qwen3VL.read_text({}, vision, "text_config")
    for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "hidden_act"):
        assert getattr(vision, name) == getattr(truth.vision_config, name)
    for name in ("num_position_embeddings", "out_hidden_size", "patch_size", "in_channels"):
        assert getattr(vision, name) == getattr(truth.vision_config, name)
    assert vision.deepstack_visual_indexes == tuple(truth.vision_config.deepstack_visual_indexes)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(text, name) == getattr(truth.text_config, name)
    assert text.head_size == truth.text_config.head_dim
    assert text.rms_norm_eps == truth.text_config.rms_norm_eps
    assert text.rope_theta == truth.text_config.rope_parameters["rope_theta"]


def test_the_hub_files(tmp_path: Path) -> None:
    """What transformers.js 4.3.2 reads of them."""
    files = read(tmp_path / "model").hub_files()
    assert files.config["model_type"] == "qwen3_vl"
    assert files.config["vision_config"]["spatial_merge_size"] == 2
    assert files.config["text_config"]["hidden_size"] == 32  # the true one, without its lanes
    assert files.config["text_config"]["head_dim"] == 16
    assert files.preprocessor_config["processor_class"] == "Qwen3VLProcessor"
    assert files.preprocessor_config["size"] == {"shortest_edge": 1024, "longest_edge": 25600}


def test_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", raw | {"model_type": "qwen3_vl_moe"})
    with raises(ConfigError, "model.unsupported") as caught:
        family_of(Checkpoint.open(folder))
    assert "dense" in str(caught.value.hint)


def test_more_lanes_than_layers_are_refused(tmp_path: Path) -> None:
    facts = ("num_hidden_layers 1", "2 deepstack_visual_indexes")
    with raises(ConfigError, "config.contradiction", *facts):
        read(tmp_path / "model", text={"num_hidden_layers": 1})


def test_without_a_stop_token_it_is_refused(tmp_path: Path) -> None:
    """transformers has no default here: such a model would never end."""
    folder = write_qwen3(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del raw["text_config"]["eos_token_id"]
    write_json(folder / "config.json", raw)
    family = family_of(Checkpoint.open(folder))
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert family.generation.stop_token_ids == tuple(stops)
    (folder / "generation_config.json").unlink()
    assert not hasattr(transformers.AutoConfig.from_pretrained(folder).text_config, "eos_token_id")
    with raises(ConfigError, "config.wrong-value", "text_config: eos_token_id"):
        family_of(Checkpoint.open(folder))


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True)])
def test_whether_the_head_is_tied_says_the_outer_config_alone(
    tmp_path: Path, outer: bool, inner: bool
) -> None:
    folder = write_qwen3(tmp_path / "model", config={"tie_word_embeddings": outer})
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["text_config"]["tie_word_embeddings"] = inner
    write_json(folder / "config.json", raw)
    assert transformers.AutoConfig.from_pretrained(folder).tie_word_embeddings is outer
    family = family_of(Checkpoint.open(folder))
    assert isinstance(family, Qwen3VL)
    assert family.text.tie_word_embeddings is outer
