"""The prefix captioner: what it reads of config.json, and what it tells runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.errors import raises
from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError, TokenizerError
from vlmport.families import FAMILIES, family_of
from vlmport.families.prefix.family import CHAT_TEMPLATE, PrefixCaptioner
from vlmport.graph.builder import to_model
from vlmport.graph.precision import PRECISIONS
from vlmport.text.chat_template import render_template


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "captioner"


def read(folder: Path, **settings: Any) -> PrefixCaptioner:
    family = family_of(Checkpoint.open(write_prefix_checkpoint(folder, **settings)))
    assert isinstance(family, PrefixCaptioner)
    return family


def add_tokens(folder: Path, *tokens: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_registry_knows_it() -> None:
    assert PrefixCaptioner in FAMILIES
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_absent_keys_mean_what_hugging_face_means_by_them(folder: Path) -> None:
    import transformers

    write_prefix_checkpoint(folder)
    raw = {
        "model_type": "prefix_conditioning_vlm",
        "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": {"model_type": "llama", "eos_token_id": 2},
    }
    write_json(folder / "config.json", raw)
    family = family_of(Checkpoint.open(folder))
    assert isinstance(family, PrefixCaptioner)
    config = family.config
    assert (config.projection_type, config.lora_r, config.lora_alpha) == ("linear", 16, 16)
    assert (config.mlp_hidden_dim, config.max_length) == (2048, 30)
    vision, text = transformers.SiglipVisionConfig(), transformers.LlamaConfig()
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "image_size",
        "hidden_act",
    ):
        assert getattr(family.vision, name) == getattr(vision, name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
        assert getattr(family.text, name) == getattr(text, name)
    assert family.text.rms_norm_eps == text.rms_norm_eps
    assert family.text.head_size == text.head_dim
    assert family.text.kv_heads == text.num_key_value_heads
    assert family.text.tie_word_embeddings == text.tie_word_embeddings
    assert family.text.rope_theta == text.rope_parameters["rope_theta"]


def test_a_whole_siglip_config_is_read_too(folder: Path) -> None:
    write_prefix_checkpoint(folder)
    checkpoint = Checkpoint.open(folder)
    inner = checkpoint.config["vision_config"]
    checkpoint.config["vision_config"] = {"model_type": "siglip", "vision_config": inner}
    assert family_of(checkpoint) == family_of(Checkpoint.open(folder))


WRONG = "config.wrong-value"
WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str, list[object]]] = {
    "encoder": (
        {"vision": {"model_type": "clip_vision_model"}},
        "config.unsupported-value",
        ["vision_config.model_type='clip_vision_model' (supported: 'siglip_vision_model')"],
    ),
    "decoder": (
        {"text": {"model_type": "gpt2"}},
        "config.unsupported-value",
        ["text_config.model_type='gpt2' (supported: 'llama')"],
    ),
    "no eos": ({"text": {"eos_token_id": None}}, WRONG, ["eos_token_id", None]),
    "negative eos": ({"text": {"eos_token_id": -1}}, WRONG, ["eos_token_id", -1]),
    "no eos in a list": ({"text": {"eos_token_id": []}}, WRONG, ["eos_token_id", []]),
    "projection": (
        {"config": {"projection_type": "conv"}},
        "config.unsupported-value",
        ['projection_type="conv"'],
    ),
    "lora rank": ({"config": {"lora_r": 0}}, WRONG, ["lora_r:", "int", "1", "got 0"]),
    "no object": (
        {"config": {"vision_config": "siglip"}},
        WRONG,
        ["vision_config:", "object", '"siglip"'],
    ),
    "no object inside": (
        {"vision": {"vision_config": [1]}},
        WRONG,
        [": vision_config: vision_config:", "object", [1]],
    ),
    "rope": (
        {"text": {"rope_scaling": "linear", "rope_parameters": None}},
        WRONG,
        ["text_config: rope_scaling:", "object", '"linear"'],
    ),
}


@pytest.mark.parametrize(("settings", "code", "facts"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_wrong_configs_are_named(
    folder: Path, settings: dict[str, Any], code: str, facts: list[object]
) -> None:
    write_prefix_checkpoint(folder)
    checkpoint = Checkpoint.open(folder)
    for key, changes in settings.items():
        section = checkpoint.config if key == "config" else checkpoint.config[f"{key}_config"]
        section |= changes
    with raises(ConfigError, code, "config.json", *facts) as caught:
        family_of(checkpoint)
    assert caught.value.hint


def test_both_wrong_towers_are_named_at_once(folder: Path) -> None:
    names = ("vision_config", "'vit'", "text_config", "'opt'")
    with raises(ConfigError, "config.unsupported-value", *names):
        read(folder, vision={"model_type": "vit"}, text={"model_type": "opt"})


def test_an_unknown_model_type_lists_the_known(folder: Path) -> None:
    with raises(ConfigError, "model.unsupported", "'prefix_conditioning'") as e:
        read(folder, config={"model_type": "prefix_conditioning"})
    assert e.value.hint.startswith("supported: prefix_conditioning_vlm")


# Tokens


def test_the_image_token_comes_after_the_tokenizer(folder: Path) -> None:
    family = read(folder)
    assert family.image_token_id == 113 == family.text.vocab_size
    assert family.prompt.image_token_id == family.prompt.placeholder_token_id == 113
    assert embedding_rows(family) == 114
    assert family.dims.vocab_size == 113  # the head's


def test_an_image_token_that_is_there_is_used(folder: Path) -> None:
    write_prefix_checkpoint(folder)
    add_tokens(folder, "<other>", "<image>", "<last>")
    family = family_of(Checkpoint.open(folder))
    assert family.prompt.image_token_id == 114
    assert embedding_rows(family) == 115


def test_a_padded_vocabulary_has_room_for_it(folder: Path) -> None:
    family = read(folder, text={"vocab_size": 320})
    assert family.prompt.image_token_id == 271  # all bytes, the merges and one special
    assert embedding_rows(family) == 320
    assert family.dims.vocab_size == 320


def embedding_rows(family: Any) -> int:
    graph = family.graphs(PRECISIONS["fp32"])["embed_tokens"].graph
    (weight,) = graph.initializers.values()
    return weight.shape[0]


def test_no_tokenizer_is_an_error(folder: Path) -> None:
    with raises(TokenizerError, "tokenizer.missing-file", "tokenizer.json"):
        read(folder, tokenizer=False)


@pytest.mark.parametrize(
    ("generation", "text", "stops", "pad"),
    [
        (None, {"eos_token_id": 5}, (5,), 5),
        (None, {"eos_token_id": [5, 7, 5]}, (5, 7), 5),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 5}, (2, 0), 2),
        ({"do_sample": False}, {"eos_token_id": 5}, (5,), 5),
        (None, {"eos_token_id": 5, "pad_token_id": 0}, (5,), 0),
        (None, {"eos_token_id": 5, "pad_token_id": -1}, (5,), 5),
        (None, {"eos_token_id": 0, "pad_token_id": 3}, (0,), 3),
    ],
)
def test_stop_and_padding_tokens(
    folder: Path, generation: Any, text: dict[str, Any], stops: tuple[int, ...], pad: int
) -> None:
    write_prefix_checkpoint(folder, text=text)
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    spec = family_of(Checkpoint.open(folder)).generation
    assert (spec.stop_token_ids, spec.pad_token_id) == (stops, pad)
    assert not spec.processors_see_prompt


# Prompt


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_the_template_emits_placeholders_alone(copies: int) -> None:
    parts = [{"type": "image"}] * copies
    rendered = render_template(
        CHAT_TEMPLATE,
        messages=[{"role": "user", "content": parts}, {"role": "user", "content": []}],
        add_generation_prompt=True,
    )
    assert rendered == "<image>" * copies


@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hello"}]])
def test_the_template_refuses_text(content: Any) -> None:
    with pytest.raises(Exception, match="takes pictures and no text"):
        render_template(CHAT_TEMPLATE, messages=[{"role": "user", "content": content}])


def test_the_caption_prompt_is_the_picture(folder: Path) -> None:
    (message,) = read(folder).prompt.caption
    rendered = render_template(CHAT_TEMPLATE, messages=[message])
    assert rendered == "<image>"


# Pixels


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"size": {"height": 31, "width": 30}}, "config.contradiction"),
        ({"size": {"shortest_edge": 30}}, "config.contradiction"),
        ({"size": 30}, "config.contradiction"),
        ({"do_normalize": False}, "config.unsupported-value"),
        ({"do_center_crop": True}, "config.unsupported-value"),
        ({"resample": 0}, "config.unsupported-value"),
        ({"image_mean": [0.5]}, WRONG),
        ({"image_std": ["a", 1, 1]}, WRONG),
    ],
    ids=str,
)
def test_pixels_that_are_not_computed_are_refused(
    folder: Path, wrong: dict[str, Any], code: str
) -> None:
    write_prefix_checkpoint(folder)
    write_json(folder / "preprocessor_config.json", wrong)
    with raises(ConfigError, code, "preprocessor_config.json", next(iter(wrong))):
        family_of(Checkpoint.open(folder))


def test_pixel_settings_reach_the_graph(folder: Path) -> None:
    write_prefix_checkpoint(folder)
    settings = {
        "size": {"height": 30, "width": 30},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.25, 1.0],
        "rescale_factor": 0.01,
        "resample": 2,
        "do_center_crop": None,
    }
    write_json(folder / "preprocessor_config.json", settings)
    family = family_of(Checkpoint.open(folder))
    assert family.pixels.resample == "bilinear"
    outputs = run_image_processor(family, np.full((30, 30, 3), (100, 50, 200), np.uint8))
    expected = (np.array([1.0, 0.5, 2.0]) - settings["image_mean"]) / settings["image_std"]
    np.testing.assert_allclose(outputs["pixel_values"][0, :, 3, 4], expected, rtol=1e-6)
    assert outputs["prompt_ids"].tolist() == [113] * 25


def run_image_processor(family: Any, rgb: np.ndarray) -> dict[str, np.ndarray]:
    proto = ir.to_proto(to_model(family.fixed_graphs()["image_processor"]))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": rgb}), strict=True))


# Graphs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_widths_that_blocks_do_not_divide_have_every_precision(
    precision: str, folder: Path
) -> None:
    text = {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    graphs = read(folder, text=text).graphs(PRECISIONS[precision])
    assert graphs["embed_tokens"].graph.outputs[0].shape == ["batch_size", "sequence_length", 48]


def test_only_the_pooling_head_may_be_left_over(folder: Path) -> None:
    family = read(folder)
    assert family.is_unused("vision_encoder.head.probe")
    assert not family.is_unused("vision_encoder.header.weight")
    assert not family.is_unused("language_model.lm_head.weight")
    headless = read(folder, vision={"vision_use_head": False})
    assert not headless.is_unused("vision_encoder.head.probe")  # then the config is another's


# Files


def test_the_hub_files_are_llavas(folder: Path) -> None:
    write_prefix_checkpoint(folder)
    checkpoint = Checkpoint.open(folder)
    for absent in ("num_key_value_heads", "head_dim"):
        del checkpoint.config["text_config"][absent]
    files = family_of(checkpoint).hub_files()
    assert files.config["model_type"] == "llava"
    assert files.config["architectures"] == ["LlavaForConditionalGeneration"]
    assert files.config["image_token_index"] == 113
    assert files.config["image_seq_length"] == 25
    # transformers.js computes the cache's shape from these two.
    assert files.config["text_config"]["num_key_value_heads"] == 4
    assert files.config["text_config"]["head_dim"] == 8
    assert files.config["eos_token_id"] == files.generation_config["eos_token_id"] == [0]
    assert files.generation_config["max_new_tokens"] == 30
    pixels = files.preprocessor_config
    assert pixels["size"] == {"height": 30, "width": 30}
    assert (pixels["resample"], pixels["rescale_factor"]) == (3, 1 / 255)
    assert pixels["image_mean"] == pixels["image_std"] == [0.5, 0.5, 0.5]
    assert files.processor_config["image_token"] == "<image>"
    assert files.new_tokens == ("<image>",)
    assert files.pipeline_tag == "image-to-text"
    assert files.chat_template == CHAT_TEMPLATE


def test_every_error_has_a_hint(folder: Path) -> None:
    write_prefix_checkpoint(folder)
    for name in ("generation_config.json", "preprocessor_config.json"):
        (folder / name).write_text("[]", encoding="utf-8")
        with raises(ConfigError, "source.not-json", folder / name, "object") as caught:
            family_of(Checkpoint.open(folder))
        assert caught.value.hint
        (folder / name).unlink()
