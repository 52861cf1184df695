"""The source's generation settings: none is dropped, and each client gets what it can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_json, write_prefix_checkpoint
from vlmport.checkpoint import Checkpoint
from vlmport.errors import ConfigError
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.families.base import Family

SETTINGS: dict[str, Any] = {
    "_from_model_config": True,
    "bad_words_ids": [[5], [7, 8]],
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": [0, 3],
    "length_penalty": 2.0,
    "max_new_tokens": 21,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "pad_token_id": None,
    "repetition_penalty": 1.2,
    "temperature": 0.7,
    "top_p": None,
    "transformers_version": "4.56.2",
    "an_option_of_tomorrow": {"a": [1]},
}
DEFAULTS = {
    "bad_words_ids": [[5], [7, 8]],
    "do_sample": True,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "repetition_penalty": 1.2,
    "temperature": 0.7,
    "an_option_of_tomorrow": {"a": [1]},
}


def read(folder: Path, settings: Any, **changes: Any) -> Family:
    write_prefix_checkpoint(folder, **changes)
    write_json(folder / "generation_config.json", settings)
    return family_of(Checkpoint.open(folder))


def test_every_option_reaches_the_manifest(tmp_path: Path) -> None:
    read(tmp_path / "captioner", SETTINGS)
    spec = export(tmp_path / "captioner", tmp_path / "out", precisions="fp32").manifest.generation
    assert spec.defaults == DEFAULTS
    assert spec.max_new_tokens == 21
    assert spec.stop_token_ids == (0, 3)


def test_transformers_js_gets_what_it_applies_to_greedy_decoding(tmp_path: Path) -> None:
    """Its beam search gives one beam, and sampling would not be what was verified."""
    read(tmp_path / "captioner", SETTINGS)
    export(tmp_path / "captioner", tmp_path / "out", precisions="fp32")
    written = json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8"))
    assert written == {
        "bad_words_ids": [[5], [7, 8]],
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "do_sample": False,
        "eos_token_id": [0, 3],
        "pad_token_id": 0,
        "max_new_tokens": 21,
    }


def test_without_a_length_of_its_own_the_config_has_one(tmp_path: Path) -> None:
    for settings in ({}, {"max_new_tokens": None}):
        family = read(tmp_path, settings, config={"max_length": 17})
        assert family.generation.max_new_tokens == 17
        assert family.hub_files().generation_config["max_new_tokens"] == 17
        assert family.generation.defaults == {}


@pytest.mark.parametrize(
    ("pad", "text", "expected"), [(6, {"pad_token_id": 5}, 6), (None, {"pad_token_id": 5}, 5)]
)
def test_padding_is_what_generate_pads_with(
    tmp_path: Path, pad: int | None, text: dict[str, Any], expected: int
) -> None:
    assert read(tmp_path, {"pad_token_id": pad}, text=text).generation.pad_token_id == expected


def test_a_null_says_nothing(tmp_path: Path) -> None:
    family = read(tmp_path, {"eos_token_id": None}, text={"eos_token_id": 5})
    assert family.generation.stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"eos_token_id": -1}, {"eos_token_id": 5}, "generation_config.json: eos_token_id is -1"),
        ({"eos_token_id": []}, {"eos_token_id": 5}, "generation_config.json: eos_token_id is []"),
        ({}, {"eos_token_id": None}, "config.json: text_config: eos_token_id is None"),
        ({"max_new_tokens": 0}, {}, "max_new_tokens: expected an int of at least 1 or null, got 0"),
        ({"bad_words_ids": [5]}, {}, "generation_config.json: bad_words_ids"),
        ({"repetition_penalty": "a"}, {}, "generation_config.json: repetition_penalty"),
    ],
)
def test_wrong_settings_are_named_with_their_file(
    tmp_path: Path, settings: dict[str, Any], text: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, settings, text=text)
    assert expected in str(caught.value)
    assert caught.value.hint
