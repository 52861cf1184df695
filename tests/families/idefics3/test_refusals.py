"""What the export of Idefics3 and SmolVLM refuses, and what their bundles do, in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_json
from tests.errors import raises
from tests.families.idefics3.test_family import IMAGE, blank, folder, read, text, tiny, user
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from vlmport.checkpoint import Checkpoint
from vlmport.errors import (
    ConfigError,
    ExportError,
    PromptError,
    TokenizerError,
    VlmportError,
    WeightError,
)
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.runtime.model import VLM

__all__ = ["folder", "tiny"]  # fixtures


def test_a_grid_beyond_the_tokenizers_markers(folder: Path) -> None:
    with raises(
        TokenizerError, "tokenizer.missing-tokens", "'<row_1_col_3>', '<row_2_col_3>'", "3"
    ) as e:
        read(folder, markers=2)
    assert e.value.hint
    read(folder, markers=3)
    read(folder, markers=0, pixels={"size": {"longest_edge": 32}})  # one tile needs none


OTHER, CONTRADICTION = "config.unsupported-value", "config.contradiction"
WRONG: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "decoder": ({"text": {"model_type": "mistral"}}, OTHER, ["text_config.model_type='mistral'"]),
    "image token": (
        {"config": {"image_token_id": 5}},
        CONTRADICTION,
        ["image_token_id 5", "'<image>'"],
    ),
    "activation": ({"vision": {"hidden_act": "relu"}}, OTHER, ['hidden_act="relu"']),
    "shuffle": (
        {"config": {"scale_factor": 3}},
        CONTRADICTION,
        ["4 patches", "of 8", "scale_factor 3"],
    ),
    "tile": (
        {"pixels": {"max_image_size": {"longest_edge": 4}}},
        CONTRADICTION,
        ["4 pixels", "0 patches"],
    ),
    "size": (
        {"pixels": {"size": {"height": 3}}},
        "config.wrong-value",
        ["size:", "'longest_edge'"],
    ),
    "resize": ({"pixels": {"do_resize": False}}, OTHER, ["do_resize=false"]),
    "filter": ({"pixels": {"resample": 0}}, OTHER, ["resample=0"]),
}


@pytest.mark.parametrize(("settings", "code", "facts"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_named(
    folder: Path, settings: dict[str, Any], code: str, facts: list[str]
) -> None:
    with raises(ConfigError, code, *facts) as caught:
        read(folder, **settings)
    assert caught.value.hint


def test_files_that_disagree_or_are_missing(folder: Path) -> None:
    write_idefics3_checkpoint(folder)

    def refused(kind: type[VlmportError], code: str, *facts: str) -> None:
        with raises(kind, code, *facts) as caught:
            family_of(Checkpoint.open(folder))
        assert caught.value.hint

    write_json(folder / "processor_config.json", {"image_seq_len": 64})
    refused(ConfigError, CONTRADICTION, "image_seq_len 64", "4 features")
    write_json(folder / "processor_config.json", {})
    (folder / "preprocessor_config.json").unlink()
    refused(ConfigError, "checkpoint.no-image-processor", "preprocessor_config.json")
    write_idefics3_checkpoint(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    refused(TokenizerError, "template.missing", str(folder))


def test_a_position_table_of_another_size(folder: Path, tmp_path: Path) -> None:
    write_idefics3_checkpoint(folder, vision={"image_size": 48})
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 32
    write_json(folder / "config.json", config)
    with raises(WeightError, "weights.misshapen", "position_embedding.weight'", "[36, 32]"):
        export(folder, tmp_path / "bundle", precisions="fp32")


@pytest.mark.parametrize(
    "template",
    ["{% for message in messages %}", "{{ messages[0]['content'][0]['text'].x.y }}", "Hi"],
)
def test_a_malformed_template(folder: Path, tmp_path: Path, template: str) -> None:
    write_idefics3_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(template)
    with raises(ExportError, "export.prompt-without-image"):
        export(folder, tmp_path / "bundle", precisions="fp32")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("messages", "images", "code", "facts"),
    [
        ([user(IMAGE, text("x"))], 0, "prompt.image-count", ["0 images", "1 image"]),
        ([user(text("x"))], 1, "prompt.image-count", ["1 image", "0 image"]),
        ([{"role": "bot", "content": "x"}], 0, "prompt.unknown-role", ["'bot'"]),
        (
            [user({"type": "video"}, text("x"))],
            0,
            "prompt.unknown-part",
            ["text", "image", "{'type': 'video'}"],
        ),
        ([{"role": "user", "content": []}], 0, "template.refuses", []),
    ],
)
def test_messages_that_are_refused(
    tiny: VLM, messages: Any, images: int, code: str, facts: list[str]
) -> None:
    with raises(PromptError, code, *facts) as caught:
        tiny.generate(messages, [blank(8, 8)] * images)
    assert caught.value.hint


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    checkpoint = write_idefics3_checkpoint(tmp_path / "c", text={"max_position_embeddings": 100})
    with VLM.open(export(checkpoint, tmp_path / "b", precisions="fp32")) as model:
        with raises(PromptError, "prompt.too-long", "100"):
            model.generate([user(IMAGE, IMAGE, text("x"))], [blank(9, 9)] * 2)
        assert model.components.opened == ("image_processor",)
