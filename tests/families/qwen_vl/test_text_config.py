"""What the text configs of Qwen2.5-VL and Qwen3-VL say, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.errors import raises
from tests.families.qwen_vl.test_text import BASE, CASES, INTERLEAVED
from tests.shared_testdata import shared_testdata
from vlmport.errors import ConfigError
from vlmport.families.qwen_vl.text import Qwen2_5TextConfig, Qwen3TextConfig
from vlmport.files.json_files import load_json
from vlmport.graph.decoder_config import DecoderConfig

SHARED = {
    "Qwen2.5-VL-3B-Instruct": (Qwen2_5TextConfig, 128, (16, 24, 24), 36, 1e6),
    "Qwen2.5-VL-7B-Instruct": (Qwen2_5TextConfig, 128, (16, 24, 24), 28, 1e6),
    "Qwen3-VL-2B-Instruct": (Qwen3TextConfig, 128, (24, 20, 20), 28, 5e6),
    "Qwen3-VL-4B-Instruct": (Qwen3TextConfig, 128, (24, 20, 20), 36, 5e6),
}


@pytest.mark.parametrize("name", SHARED)
def test_the_published_configs_are_read(name: str) -> None:
    path = shared_testdata("configs", name, "config.json")
    if path is None:
        pytest.skip("needs the shared test data")
    reader, head_dim, section, layers, theta = SHARED[name]
    raw = load_json(path, error=ConfigError, hint="")
    config = reader.read(raw.get("text_config", raw), "config.json")
    assert (config.head_size, config.mrope_section) == (head_dim, section)
    assert (config.num_hidden_layers, config.rope_theta) == (layers, theta)
    assert config.mrope_interleaved == config.qk_norm == (reader is Qwen3TextConfig)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "sections that are too many": (
        Qwen2_5TextConfig,
        {"rope_scaling": {"type": "mrope", "mrope_section": [3, 3, 3]}},
        "shares out 9 frequencies, head_dim 16 has 8",
    ),
    "two sections": (
        Qwen2_5TextConfig,
        {"rope_scaling": {"type": "mrope", "mrope_section": [4, 4]}},
        "mrope_section",
    ),
    "the other kind's turns": (
        Qwen2_5TextConfig,
        {"rope_parameters": INTERLEAVED},
        "mrope_interleaved=True, expected False",
    ),
    "no turns": (
        Qwen3TextConfig,
        {"rope_parameters": {"mrope_section": [4, 2, 2], "mrope_interleaved": False}},
        "mrope_interleaved=False, expected True",
    ),
    "scaled angles": (
        Qwen2_5TextConfig,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}},
        "rope_type='yarn', expected 'default' or 'mrope'",
    ),
    "a sliding window": (Qwen2_5TextConfig, {"use_sliding_window": True}, "use_sliding_window"),
    "two sections that differ": (
        Qwen2_5TextConfig,
        {
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "rope_parameters": {"mrope_section": [4, 2, 2]},
        },
        "mrope_section is given as",
    ),
}


@pytest.mark.parametrize(("reader", "changes", "told"), WRONG.values(), ids=WRONG)
def test_maths_that_is_not_computed_is_refused(
    reader: Any, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: ") as caught:
        reader.read({**BASE, "head_dim": 16, **changes}, "config.json")
    assert told in str(caught.value)
    assert caught.value.hint


def test_more_lanes_than_layers_are_refused() -> None:
    with raises(ConfigError, "config.contradiction", "4", "3"):
        dataclasses.replace(CASES["qwen3"].config, deepstack_lanes=4).check("here")


def test_keys_of_the_kind_are_not_read_from_a_file() -> None:
    """A Llama whose config says otherwise is a Llama."""
    raw = {**BASE, "qk_norm": True, "qkv_bias": True, "deepstack_lanes": 2}
    config = DecoderConfig.read(raw, "here")
    assert (config.qk_norm, config.qkv_bias, config.deepstack_lanes) == (False, False, 0)
