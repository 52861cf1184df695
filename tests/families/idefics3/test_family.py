"""Idefics3 and SmolVLM: what is read of a checkpoint, the prompt to the id, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.checkpoints import write_json
from tests.idefics3_checkpoints import TEMPLATE, write_idefics3_checkpoint, write_marked_tokenizer
from tests.shared_testdata import shared_testdata
from vlmport.bundle import Bundle
from vlmport.checkpoint import Checkpoint
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.families.idefics3.family import Idefics3
from vlmport.families.idefics3.smolvlm import SmolVLM
from vlmport.graph.precision import PRECISIONS
from vlmport.parity.references import load_reference
from vlmport.runtime.model import VLM
from vlmport.text.tokenizer import read_tokenizer

IMAGE = {"type": "image"}
REAL = shared_testdata("tokenizers", "SmolVLM-256M-Instruct")
CONFIGS = shared_testdata("configs")
# Tiles of the real size under a tower whose 8 x 8 patches are the 64 tokens: cheap.
REAL_SIZES: dict[str, Any] = {
    "vision": {"image_size": 512, "patch_size": 64, "num_hidden_layers": 1},
    "text": {"max_position_embeddings": 8192, "num_hidden_layers": 1},
    "config": {"scale_factor": 1},
    "pixels": {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}},
}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def read(folder: Path, **settings: Any) -> Idefics3:
    family = family_of(Checkpoint.open(write_idefics3_checkpoint(folder, **settings)))
    assert isinstance(family, Idefics3)
    return family


def prompt_ids(model: VLM, messages: Any, images: Any, split: bool = True) -> list[int]:
    """The prompt as the runtime puts it together, without running the vision encoder."""
    options = {"do_image_splitting": split}
    encoded = model.prompter.encode(model.prompter.render(messages))
    pictures = [model.components.process_image(one, options).prompt_ids for one in images]
    return model.prompter.splice(encoded, pictures).tolist()


def blank(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


# What is read


def test_both_names(tmp_path: Path) -> None:
    assert type(read(tmp_path / "a")) is Idefics3
    family = read(tmp_path / "b", model_type="smolvlm")
    assert type(family) is SmolVLM
    files = family.hub_files()
    assert files.config["model_type"] == "smolvlm"
    assert files.processor_config["processor_class"] == "SmolVLMProcessor"
    assert files.preprocessor_config["image_processor_type"] == "SmolVLMImageProcessor"


def test_both_spellings_are_one_model(tmp_path: Path) -> None:
    old, new = (read(tmp_path / name, spelling=name) for name in ("v4", "v5"))
    assert new.chat_template == TEMPLATE
    for field in dataclasses.fields(Idefics3):
        if field.name not in ("raw", "tokens"):
            assert getattr(old, field.name) == getattr(new, field.name), field.name


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_absent_keys_mean_what_hugging_face_means_by_them(folder: Path, model_type: Any) -> None:
    write_idefics3_checkpoint(folder, model_type=model_type)
    checkpoint = Checkpoint.open(folder)
    token = checkpoint.config["image_token_id"]
    pixels = {"do_image_splitting": True, "size": {"longest_edge": 1456}}
    pixels["max_image_size"] = {"longest_edge": 384}  # 12 patches; the class's 364 are 11, too few
    write_json(folder / "preprocessor_config.json", pixels)
    write_json(folder / "processor_config.json", {"image_seq_len": 36})
    kinds = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}
    truth = kinds[model_type]()
    checkpoint.config.clear()
    checkpoint.config.update({"model_type": model_type, "image_token_id": token})
    family = family_of(checkpoint)
    assert isinstance(family, Idefics3)
    assert family.config.scale_factor == truth.scale_factor
    assert family.config.tie_word_embeddings == truth.tie_word_embeddings
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(family.vision, name) == getattr(truth.vision_config, name)
        assert getattr(family.text, name) == getattr(truth.text_config, name)
    for name in ("image_size", "patch_size", "hidden_act", "layer_norm_eps"):
        assert getattr(family.vision, name) == getattr(truth.vision_config, name)
    assert family.text.rms_norm_eps == truth.text_config.rms_norm_eps == 1e-5
    assert family.text.rope_theta == truth.text_config.rope_parameters["rope_theta"]

    checkpoint.config["text_config"] = {"model_type": "llama"}  # not absent: a Llama's own
    assert family_of(checkpoint).text.rms_norm_eps == transformers.LlamaConfig().rms_norm_eps


def test_the_head_is_tied_where_the_outer_config_says_so(tmp_path: Path) -> None:
    inner = read(tmp_path / "inner", text={"tie_word_embeddings": True})
    assert not inner.text.tie_word_embeddings
    outer = read(tmp_path / "outer", config={"tie_word_embeddings": True})
    assert outer.text.tie_word_embeddings


def test_stop_ids_are_those_of_generation_and_tokenizer(folder: Path) -> None:
    family = read(folder)
    (stop,) = family.generation.stop_token_ids
    assert stop == family.tokens.image + 1  # <end_of_utterance>
    (folder / "generation_config.json").unlink()
    family = family_of(Checkpoint.open(folder))
    assert family.generation.stop_token_ids == (2, stop)  # the decoder's own, which never comes
    assert family.generation.max_new_tokens == 500
    assert family.generation.processors_see_prompt


@pytest.mark.parametrize(
    ("ending", "stops"),
    [
        ("<|im_end|>\n", ["<end_of_utterance>", "<|im_end|>"]),
        ("  {{ bos_token }}", ["<end_of_utterance>", "<|im_start|>"]),
        ("\nand so on", ["<end_of_utterance>"]),  # no special token ends it
        ("", ["<end_of_utterance>"]),
        # Such a model answers one question; whoever talks on is told so by the template.
        (
            "{% if message['role'] == 'assistant' %}{{ raise_exception('no turns') }}{% endif %}",
            ["<end_of_utterance>"],
        ),
    ],
)
def test_what_the_template_writes_after_an_answer_stops_too(
    folder: Path, ending: str, stops: list[str]
) -> None:
    """Fine-tuned with another end of turn, under the old generation_config.json."""
    write_idefics3_checkpoint(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE.replace("<end_of_utterance>\n", ending)
    write_json(folder / "tokenizer_config.json", settings)
    family = family_of(Checkpoint.open(folder))
    known = read_tokenizer(folder)
    assert family.generation.stop_token_ids == tuple(known.token_to_id(one) for one in stops)
    assert family.hub_files().generation_config["eos_token_id"] == list(
        family.generation.stop_token_ids
    )
    token = known.token_to_id("<image>")
    reference = load_reference(folder, image_token_id=token)
    assert reference.stop_token_ids == family.generation.stop_token_ids


def test_options_reach_the_manifest(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_idefics3_checkpoint(folder, pixels={"do_image_splitting": False})
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    manifest = Bundle.open(bundle.folder).manifest
    assert manifest.image_options == {"do_image_splitting": False}
    assert manifest.golden.options == {"do_image_splitting": False}
    with VLM.open(bundle) as model:
        alone = model.components.process_image(blank(40, 30))
        split = model.components.process_image(blank(40, 30), {"do_image_splitting": True})
    assert alone.inputs["pixel_values"].shape == (1, 1, 3, 32, 32)
    assert split.inputs["pixel_values"].shape == (1, 10, 3, 32, 32)
    assert split.inputs["pixel_attention_mask"].dtype == np.bool_
    assert split.inputs["pixel_attention_mask"].shape == (1, 10, 32, 32)
    assert split.inputs["pixel_attention_mask"].all()


def test_the_hub_files(folder: Path) -> None:
    """What transformers.js 4.3.2 reads of them."""
    files = read(folder).hub_files()
    assert files.config["model_type"] == "idefics3"
    assert files.config["image_token_id"] == files.config["eos_token_id"][0] - 1
    sizes = files.config["text_config"]
    assert (sizes["num_hidden_layers"], sizes["num_key_value_heads"], sizes["head_dim"]) == (
        2,
        2,
        8,
    )
    assert (sizes["hidden_size"], sizes["num_attention_heads"]) == (32, 4)
    assert files.processor_config == {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    pixels = files.preprocessor_config
    assert pixels["size"] == {"longest_edge": 96}
    assert pixels["max_image_size"] == {"longest_edge": 32}
    assert pixels["do_image_splitting"] is True
    assert (pixels["resample"], pixels["rescale_factor"]) == (1, 1 / 255)
    assert files.chat_template == TEMPLATE
    assert files.pipeline_tag == "image-text-to-text"


@pytest.mark.skipif(CONFIGS is None, reason="no shared test data")
@pytest.mark.parametrize(
    ("name", "kind", "layers"),
    [
        ("SmolVLM-256M-Instruct", Idefics3, 30),
        ("SmolVLM2-500M-Video-Instruct.unverified", SmolVLM, 32),
    ],
)
def test_the_real_configs_are_read(folder: Path, name: str, kind: type, layers: int) -> None:
    assert CONFIGS is not None
    write_idefics3_checkpoint(folder, tokenizer=REAL)
    (folder / "generation_config.json").unlink()
    for path in (CONFIGS / name).glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    family = family_of(Checkpoint.open(folder))
    assert type(family) is kind
    assert family.text.num_hidden_layers == layers
    assert family.tokens.count == 64
    assert 49279 in family.generation.stop_token_ids
    assert set(family.graphs(PRECISIONS["q4"])) == {
        "vision_encoder",
        "embed_tokens",
        "decoder_model_merged",
    }


# The prompt


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """The real tokenizer, template and tile sizes."""
    if REAL is None:
        pytest.skip("no shared test data")
    folder = tmp_path_factory.mktemp("real")
    checkpoint = write_idefics3_checkpoint(folder / "checkpoint", tokenizer=REAL, **REAL_SIZES)
    return VLM.open(export(checkpoint, folder / "bundle", precisions="fp32"))


def test_the_known_prompt_without_splitting(real: VLM) -> None:
    asked = [user(IMAGE, text("Can you describe this image?"))]
    after = [49189, 7306, 346, 5125, 451, 2443, 47, 49279, 198, 9519, 9531, 42]
    expected = [1, 11126, 42, 49189, 49152, *[49190] * 64, *after]
    assert len(expected) == 81
    assert prompt_ids(real, asked, [blank(640, 480)], split=False) == expected
    (caption,) = real.components.manifest.prompt.caption
    assert [caption] == asked


def test_the_known_prompt_of_twelve_tiles(real: VLM) -> None:
    ids = prompt_ids(real, [user(IMAGE, text("Describe this image in detail."))], [blank(960, 686)])
    assert len(ids) == 876
    assert ids.count(49190) == 13 * 64
    markers = [one for one in ids if 49152 <= one < 49189]
    rows = [[49153 + 6 * row + column for column in range(4)] for row in range(3)]
    assert markers == [*rows[0], *rows[1], *rows[2], 49152]
    assert ids.count(1116) == 1  # two newlines in one token
    assert ids.count(198) == 2 + 1  # after two rows of tiles, and after the user's turn


def test_the_known_prompt_of_sixteen_tiles(real: VLM) -> None:
    ids = prompt_ids(real, [user(IMAGE, text("Describe this image in detail."))], [blank(224, 224)])
    assert ids.count(49190) == 1088


@pytest.mark.parametrize("joins_newlines", [True, False])
def test_stand_in_prompts_are_transformers(tmp_path: Path, joins_newlines: bool) -> None:
    """Several pictures and turns, text alone; newlines that join and that don't."""
    checkpoint = write_idefics3_checkpoint(tmp_path / "checkpoint")
    write_marked_tokenizer(checkpoint, 4, joins_newlines=joins_newlines)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil.from_pretrained(checkpoint),
        tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE,
    )
    conversation = [
        {"role": "system", "content": [text("Be brief.")]},
        user(IMAGE, text("one,"), IMAGE, text("two?")),
        {"role": "assistant", "content": [text("A cat, 2 dogs.")]},
        user(text("And this?\n\n"), IMAGE),
    ]
    pictures = [blank(64, 20), blank(30, 90), blank(5, 5)]
    with VLM.open(bundle) as model:
        for split in (True, False):
            for messages, images in ((conversation, pictures), ([user(text("Hi"))], [])):
                rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
                given = {"images": [images], "do_image_splitting": split} if images else {}
                expected = processor(text=rendered, **given)["input_ids"][0]
                assert prompt_ids(model, messages, images, split) == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = write_idefics3_checkpoint(folder / "checkpoint")
    return VLM.open(export(checkpoint, folder / "bundle", precisions="fp32"))


# Running


def test_tiles_run_one_by_one(tiny: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same features as of all tiles in one run, and of tiles among others that are padding."""
    session = tiny.components.session("vision_encoder")
    inputs = tiny.components.process_image(blank(40, 30)).inputs
    rng = np.random.default_rng(0)
    inputs["pixel_values"] = rng.standard_normal(inputs["pixel_values"].shape, np.float32)
    (whole,) = session.run(None, inputs)
    assert whole.shape == (10 * 4, 32)
    counts = []

    class Counting:
        get_inputs = session.get_inputs

        def run(self, names: Any, feeds: Any) -> Any:
            counts.append(feeds["pixel_values"].shape[:2])
            return session.run(names, feeds)

    monkeypatch.setitem(tiny.components._sessions, "vision_encoder", Counting())
    features = tiny.components.encode_image(inputs)
    assert counts == [(1, 1)] * 10
    np.testing.assert_allclose(features, whole, atol=2e-5)

    padded = {name: np.concatenate([value, value]) for name, value in inputs.items()}
    padded["pixel_attention_mask"][0, 7:] = False  # rows of a batch have 7 and 10 tiles
    (some,) = session.run(None, padded)
    np.testing.assert_allclose(some, np.concatenate([whole[:28], whole]), atol=2e-5)


def test_a_picture_is_encoded_once_for_each_option(tiny: VLM) -> None:
    asked = [user(IMAGE, text("x"))]
    before = tiny.features.misses
    for split in (True, False, True):
        options = {"do_image_splitting": split}
        tiny.generate(asked, [blank(20, 20)], image_options=options, max_new_tokens=1)
    assert tiny.features.misses == before + 2


def test_a_batch_of_unequal_tilings(tiny: VLM) -> None:
    """One, four and ten tiles together say what each says alone."""
    rng = np.random.default_rng(0)
    shown = [
        rng.integers(0, 256, (height, width, 3), np.uint8)
        for height, width in ((40, 40), (10, 300), (90, 20), (64, 50))
    ]
    alone = [tiny.caption(one, max_new_tokens=8) for one in shown]
    lengths = [one.counts["prompt_tokens"] for one in alone]
    assert len(set(lengths)) == 3
    together = tiny.caption(shown, max_new_tokens=8)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
