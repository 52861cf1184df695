"""Qwen2.5-VL: what is read of a checkpoint, what is written of it, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from tests.checkpoints import write_json
from tests.errors import raises
from tests.families.qwen_vl.test_qwen3 import wanted
from tests.qwen_checkpoints import write_qwen2_5
from tests.shared_testdata import shared_testdata
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import FUSED
from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError, ImageError, VlmportError
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.families.base import SizedLayout
from vlmport.families.qwen_vl.family import plain_name
from vlmport.families.qwen_vl.qwen2_5 import Qwen2_5VL
from vlmport.families.qwen_vl.text import Qwen2_5TextConfig
from vlmport.families.qwen_vl.tower_2_5 import Qwen2_5VisionConfig
from vlmport.graph.precision import PRECISIONS
from vlmport.runtime.model import VLM
from vlmport.text.tokenizer import read_tokenizer

REAL = shared_testdata("configs", "Qwen2.5-VL-3B-Instruct")
SPELLINGS: list[Literal["v4", "v5"]] = ["v4", "v5"]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """From the newer spelling, in several files of bfloat16."""
    place = tmp_path_factory.mktemp("qwen2_5")
    checkpoint = write_qwen2_5(place / "model", spelling="v5", dtype="BF16", shards=3)
    return export(checkpoint, place / "bundle", precisions="fp32")


def read(folder: Path, **settings: Any) -> Qwen2_5VL:
    family = family_of(Checkpoint.open(write_qwen2_5(folder, **settings)))
    assert isinstance(family, Qwen2_5VL)
    return family


# What is read


def test_both_spellings_are_one_model(tmp_path: Path) -> None:
    old, new = (read(tmp_path / spelling, spelling=spelling) for spelling in SPELLINGS)
    for field in dataclasses.fields(Qwen2_5VL):
        if field.name != "raw":
            assert getattr(old, field.name) == getattr(new, field.name), field.name
    names = [
        family_of(checkpoint).weights(checkpoint, None).keys()
        for checkpoint in map(Checkpoint.open, (tmp_path / spelling for spelling in SPELLINGS))
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_read_is_what_transformers_reads(folder: Path, spelling: Any) -> None:
    family = read(folder, spelling=spelling)
    truth = transformers.AutoConfig.from_pretrained(folder)
    assert_equals(family.vision, truth.vision_config)
    assert_equals(family.text, truth.text_config)
    assert (
        list(family.text.mrope_section or ()) == truth.text_config.rope_parameters["mrope_section"]
    )
    assert family.text.rope_theta == truth.text_config.rope_parameters["rope_theta"]


def assert_equals(config: Any, truth: Any) -> None:
    """Every key that transformers has too. Whether a head is tied says the outer config."""
    for field in dataclasses.fields(config):
        if field.name not in ("tie_word_embeddings", "head_dim") and hasattr(truth, field.name):
            values = [getattr(one, field.name) for one in (config, truth)]
            first, second = (list(v) if isinstance(v, tuple) else v for v in values)
            assert first == second, field.name


def test_absent_keys_mean_what_hugging_face_means_by_them() -> None:
    truth = transformers.Qwen2_5_VLConfig()
    assert_equals(Qwen2_5VisionConfig.read({}, "here"), truth.vision_config)
    assert_equals(Qwen2_5TextConfig.read({}, "here"), truth.text_config)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(True, False, True), (False, True, True), (False, False, False), (None, True, True)],
)
def test_a_head_is_tied_where_either_says_so(
    folder: Path, outer: bool | None, inner: bool, tied: bool
) -> None:
    write_qwen2_5(folder, spelling="v5")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = inner
    raw["tie_word_embeddings"] = outer
    if outer is None:
        del raw["tie_word_embeddings"]
    write_json(folder / "config.json", raw)
    assert family_of(Checkpoint.open(folder)).text.tie_word_embeddings is tied
    assert transformers.AutoConfig.from_pretrained(folder).tie_word_embeddings is tied


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_stop_token_that_no_file_names_is_transformers(folder: Path, spelling: Any) -> None:
    write_qwen2_5(folder, spelling=spelling)
    raw = json.loads((folder / "config.json").read_text())
    del (raw if spelling == "v4" else raw["text_config"])["eos_token_id"]
    write_json(folder / "config.json", raw)
    (folder / "generation_config.json").unlink()
    truth = transformers.AutoConfig.from_pretrained(folder).text_config.eos_token_id
    stops = family_of(Checkpoint.open(folder)).generation.stop_token_ids
    # By its template it says more: what ends a turn.
    assert stops == (truth, read_tokenizer(folder).token_to_id("<|im_end|>"))


# Of the sizes that Qwen publishes: the tower's MLP; width, layers, heads, key heads, MLP and rows
# of the decoder; whether its head is tied. Files of the first two are in the shared test data;
# source of the others: Ascend/MindSpeed-MM, examples/qwen2.5vl/model_32b.json (9c027b4) and
# model_72b.json (284605c), where each size, window and full block is the same.
SIZES = {
    "3B": (3420, (2048, 36, 16, 2, 11008, 151936), True),
    "7B": (3420, (3584, 28, 28, 4, 18944, 152064), False),
    "32B": (3456, (5120, 64, 40, 8, 27648, 152064), False),
    "72B": (3456, (8192, 80, 64, 8, 29568, 152064), False),
}
DECODER_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_asks_for_the_tensors_that_transformers_has(folder: Path, size: str) -> None:
    inner, sizes, tied = SIZES[size]
    text = {
        **dict(zip(DECODER_KEYS, sizes, strict=True)),
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    vision = {"hidden_size": 1280, "intermediate_size": inner, "out_hidden_size": sizes[0]}
    outer = {"vision_config": vision, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=copy.deepcopy(text), **copy.deepcopy(outer))
        )
    truth = {plain_name(name): tuple(one.shape) for name, one in model.state_dict().items()}
    family = dataclasses.replace(
        read(folder),
        vision=Qwen2_5VL.read_vision(vision, "here"),
        text=Qwen2_5TextConfig.read(text, "here"),
    )
    assert wanted(family, "fp32") == truth
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.skipif(REAL is None, reason="the shared test data is not here")
@pytest.mark.parametrize(
    ("size", "layers", "kv_heads", "tied"), [("3B", 36, 2, True), ("7B", 28, 4, False)]
)
def test_real_configs(folder: Path, size: str, layers: int, kv_heads: int, tied: bool) -> None:
    """With the real tokenizer; the weights are the tiny ones, which nothing reads here."""
    tokenizer = shared_testdata("tokenizers", "Qwen2.5-VL")
    configs = shared_testdata("configs", f"Qwen2.5-VL-{size}-Instruct")
    assert tokenizer is not None
    assert configs is not None
    write_qwen2_5(folder, tokenizer=tokenizer, text={"hidden_size": 16, "num_attention_heads": 2})
    for file in configs.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    family = family_of(Checkpoint.open(folder))
    assert isinstance(family, Qwen2_5VL)
    text, vision = family.text, family.vision
    assert (text.num_hidden_layers, text.kv_heads, text.head_size) == (layers, kv_heads, 128)
    known = tuple(getattr(text, key) for key in DECODER_KEYS)
    assert (vision.intermediate_size, known, tied) == SIZES[size]
    assert text.tie_word_embeddings is tied
    assert text.mrope_section == (16, 24, 24)
    assert (vision.window_side, vision.head_size, vision.patch_width) == (4, 80, 1176)
    assert family.image_options == {"min_pixels": 3136, "max_pixels": 12845056}
    assert family.golden_tokens(36, 48) == 70
    assert family.generation.stop_token_ids == (151645, 151643)
    form = family.layouts[FUSED]
    assert isinstance(form, SizedLayout)
    graph = form.at(form.default).graphs(PRECISIONS["fp32"])["vision"].graph
    assert [one.shape for one in graph.inputs] == [(1, 3, 672, 672)]
    assert [one.shape for one in graph.outputs] == [(576, {"3B": 2048, "7B": 3584}[size])]


@pytest.mark.parametrize("names", ["model.language_model.", "model."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapter_of_either_spelling_is_merged(
    folder: Path, tmp_path: Path, spelling: Any, names: str
) -> None:
    """One of transformers 4 on a model of 5, and the other way round."""
    checkpoint = Checkpoint.open(write_qwen2_5(folder, spelling=spelling))
    family = family_of(checkpoint)
    plain = family.weights(checkpoint, None)
    random, tensors = np.random.default_rng(0), {}
    for layer in range(3):
        module = f"base_model.model.{names}layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = random.normal(size=(2, 64)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = random.normal(size=(64, 2)).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    write_json(adapter / "adapter_config.json", settings)
    module = f"base_model.model.{names}layers.1.self_attn.q_proj"
    change = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"] * 1.5
    got = family.weights(checkpoint, adapter)[QUERY].numpy()
    np.testing.assert_allclose(got, plain[QUERY].numpy() + change, rtol=1e-5, atol=1e-6)


def test_the_image_processor_of_processor_config_counts_first(folder: Path) -> None:
    write_qwen2_5(folder, spelling="v5")
    nested = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    write_json(folder / "preprocessor_config.json", {**nested, "size": None, "max_pixels": 4000})
    truth = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder).size
    family = family_of(Checkpoint.open(folder))
    assert family.image_options == {
        "min_pixels": truth["shortest_edge"],
        "max_pixels": truth["longest_edge"],
    }
    assert truth["longest_edge"] == nested["size"]["longest_edge"] != 4000
    write_json(folder / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    assert family_of(Checkpoint.open(folder)).image_options["max_pixels"] == 4000
    (folder / "preprocessor_config.json").unlink()
    facts = ("preprocessor_config.json", "image_processor")
    with raises(ConfigError, "checkpoint.no-image-processor", *facts):
        family_of(Checkpoint.open(folder))


def test_plain_names() -> None:
    names = {
        "model.visual.merger.ln_q.weight": "visual.merger.ln_q.weight",
        "visual.merger.ln_q.weight": "visual.merger.ln_q.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: plain_name(name) for name in names} == names


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vision": {"window_size": 6}}, "window_size 6 is less than"),
        ({"pixels": {"patch_size": 16}}, "patch_size 7 and 16"),
        ({"pixels": {"merge_size": 3}}, "spatial_merge_size 2 and 3"),
        ({"pixels": {"min_pixels": 9000, "max_pixels": 8000}}, "at least 9000 pixels"),
        ({"vision": {"out_hidden_size": 32}}, "out_hidden_size 32 of the tower, hidden_size 64"),
        ({"text": {"use_sliding_window": True}}, "use_sliding_window=true"),
        ({"text": {"rope_scaling": {"type": "yarn", "factor": 4.0}}}, "rope_type='yarn'"),
        ({"config": {"image_token_id": 5}}, r"image_token_id 5, '<\|image_pad\|>' is"),
        ({"config": {"video_token_id": 5}}, r": video_token_id 5, '<\|video_pad\|>' is"),
        ({"config": {"vision_start_token_id": 5}}, r": vision_start_token_id 5, '<\|vision_st"),
        ({"config": {"vision_end_token_id": 5}}, r": vision_end_token_id 5, '<\|vision_end\|>' i"),
        ({"text": {"vocab_size": 264}}, "image_token_id 267, the embedding has 264 rows; video_"),
        ({"config": {"model_type": "qwen2_vl"}}, "an older kind of model than Qwen2.5-VL"),
        ({"config": {"model_type": "qwen3_vl_moe"}}, "a mixture of experts, which is not supp"),
        ({"config": {"model_type": "qwen2_5_vll"}}, "did you mean 'qwen2_5_vl'"),
    ],
)
def test_wrong_settings_are_named(folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        family_of(Checkpoint.open(write_qwen2_5(folder, **settings)))
    assert caught.value.hint


def test_all_ids_that_the_tokenizer_has_otherwise_are_named_at_once(folder: Path) -> None:
    """Those of Hugging Face's class, where config.json says none; so a swapped tokenizer shows."""
    write_qwen2_5(folder)
    raw = json.loads((folder / "config.json").read_text())
    known = {key: raw[key] for key in Qwen2_5VL.token_keys}
    for key in known:
        del raw[key]
    write_json(folder / "config.json", raw)
    with pytest.raises(ConfigError) as caught:
        family_of(Checkpoint.open(folder))
    truth = transformers.Qwen2_5_VLConfig()
    for key, token in Qwen2_5VL.token_keys.items():
        given = getattr(truth, key)
        assert f"{key} {given}, {token!r} is {known[key]} in the tokenizer" in str(caught.value)
    assert "come from one model" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ((1, 300), {}, "300x1 .* one side is more than 200"),
        ((50, 60), {"min_pixels": 10**6}, "60x50 .* min_pixels is more than max_pixels"),
        ((50, 60), {"max_pixels": 1}, "min_pixels is more than max_pixels"),
        ((50, 60), {"min_pixels": 0}, "min_pixels is less than 1"),
        ((50, 60), {"min_pixel": 5}, "did you mean 'min_pixels'"),
    ],
)
def test_pictures_that_are_refused(
    bundle: Bundle, size: tuple[int, int], options: dict[str, Any], words: str
) -> None:
    with VLM.open(bundle) as model, pytest.raises(VlmportError, match=words) as caught:
        model.components.process_image(np.zeros((*size, 3), np.uint8), options)
    assert caught.value.hint
    assert isinstance(caught.value, ImageError) or "did you mean" in words


# What is written


def test_the_files_of_the_bundle_are_those_of_transformers(bundle: Bundle) -> None:
    """Its configs read back are the model's own, and its processor is the checkpoint's."""
    family = family_of(Checkpoint.open(bundle.folder.parent / "model"))
    truth = transformers.AutoConfig.from_pretrained(bundle.folder)
    assert type(truth) is transformers.Qwen2_5_VLConfig
    assert_equals(family.vision, truth.vision_config)
    assert_equals(family.text, truth.text_config)
    assert truth.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    raw = json.loads((bundle.folder / "preprocessor_config.json").read_text())
    processor = transformers.Qwen2VLImageProcessorPil(**raw)
    assert processor.size["shortest_edge"] == family.image_options["min_pixels"]
    assert processor.size["longest_edge"] == family.image_options["max_pixels"]
    assert (processor.patch_size, processor.merge_size) == (7, 2)
    for key in ("image_token_id", "video_token_id", "vision_start_token_id"):
        assert getattr(truth, key) == family.raw[key]


def test_the_golden_picture_stands_once_in_64_tokens_or_more(bundle: Bundle) -> None:
    golden = bundle.manifest.golden
    assert golden.copies == 1
    assert golden.prefill_tokens == 70
    assert golden.options == {"min_pixels": 64 * 14 * 14, "max_pixels": 128 * 14 * 14}


def test_a_smaller_picture_takes_fewer_tokens(bundle: Bundle) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (120, 90, 3)).astype(np.uint8)
    with VLM.open(bundle) as model:
        counts = [
            len(model.components.process_image(picture, {"max_pixels": most}).prompt_ids)
            for most in (4 * 196, 20 * 196, 50 * 196)
        ]
    assert counts == sorted(set(counts))
    assert counts[-1] <= 50
