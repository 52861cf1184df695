"""config.json → dataclass: defaults, and every mistake named at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from vlmport.checkpoint.config import Layers, Signed, Size, read_config
from vlmport.errors import ConfigError

WHERE = "config.json: text_config"
GOOD = {"hidden_size": 32, "num_hidden_layers": 2, "layer_norm_eps": 1e-6}


@dataclass(frozen=True)
class Vision:
    hidden_size: Size
    depths: tuple[int, ...] = (1, 2)
    parts: tuple[Vision, ...] = ()


@dataclass(frozen=True)
class Text:
    must_be: ClassVar[Mapping[str, tuple]] = {
        "hidden_act": ("silu", "gelu"),
        "attention_bias": (False,),
        "rope_scaling": (None,),
    }

    hidden_size: Size
    num_hidden_layers: Size
    layer_norm_eps: float
    eos_token_id: int | list[int] | None = None
    pad_token_id: Signed = -1
    tie_word_embeddings: bool = False
    name: str = "x"
    kind: Literal["linear", "mlp"] = "linear"
    depths: tuple[int, ...] = (1, 2)
    pair: tuple[int, int] = (1, 2)
    rope: Mapping[str, Any] | None = None
    vision: Vision | None = None
    derived: int = field(init=False, default=7)


def read(**keys: Any) -> Text:
    return read_config(Text, {**GOOD, **keys}, WHERE)


def failure(raw: Mapping[str, Any], cls: type = Text) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(cls, raw, WHERE)
    assert caught.value.hint
    return str(caught.value)


def test_defaults_fill_what_is_absent_and_unknown_keys_are_ignored() -> None:
    config = read(transformers_version="5", torch_dtype=[1, {}], derived=3)
    assert config == Text(32, 2, 1e-6)
    assert config.derived == 7


def test_all_values_are_converted() -> None:
    config = read(
        layer_norm_eps=1,
        eos_token_id=[1, 2],
        pad_token_id=-2,
        tie_word_embeddings=True,
        kind="mlp",
        depths=[3, 4, 5],
        pair=[8, 9],
        rope={"type": "default"},
        vision={"hidden_size": 4, "depths": []},
    )
    assert config.layer_norm_eps == 1.0
    assert isinstance(config.layer_norm_eps, float)
    assert config.eos_token_id == [1, 2]
    assert config.depths == (3, 4, 5)
    assert config.pair == (8, 9)
    assert config.vision == Vision(4, ())
    assert read(eos_token_id=None, vision=None).eos_token_id is None


def test_all_missing_keys_are_named_with_the_section() -> None:
    text = failure({"layer_norm_eps": 1e-6})
    assert text == "config.json: text_config: missing 'hidden_size', 'num_hidden_layers'"


def test_a_missing_key_suggests_the_near_one() -> None:
    text = failure({"hidden_sizes": 32, "num_hidden_layers": 2, "layer_norm_eps": 1e-6})
    assert "missing 'hidden_size' (did you mean 'hidden_sizes'?)" in text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", "32", 'hidden_size: expected an int of at least 1, got "32"'),
        ("hidden_size", -32, "hidden_size: expected an int of at least 1, got -32"),
        ("hidden_size", 0, "an int of at least 1, got 0"),
        ("hidden_size", 32.0, "an int of at least 1, got 32.0"),
        ("hidden_size", True, "an int of at least 1, got true"),
        ("hidden_size", None, "an int of at least 1, got null"),
        ("pad_token_id", 1.5, "pad_token_id: expected an int, got 1.5"),
        ("layer_norm_eps", "1e-6", 'a finite number, got "1e-6"'),
        ("layer_norm_eps", True, "a finite number, got true"),
        ("layer_norm_eps", float("inf"), "a finite number, got Infinity"),
        ("layer_norm_eps", 10**400, "a finite number, got 1000"),
        ("eos_token_id", -1, "an int of at least 0 or a list, each an int of at least 0 or null"),
        ("eos_token_id", [1, "2"], 'or null, got [1, "2"]'),
        ("tie_word_embeddings", 1, "true or false, got 1"),
        ("tie_word_embeddings", None, "true or false, got null"),
        ("name", 3, "name: expected a string, got 3"),
        ("kind", "conv", 'kind: expected "linear" or "mlp", got "conv"'),
        ("depths", 3, "a list, each an int of at least 0, got 3"),
        ("depths", [1, -1], "a list, each an int of at least 0, got [1, -1]"),
        ("pair", [1, 2, 3], "a list of 2, each an int of at least 0, got [1, 2, 3]"),
        ("rope", [], "an object or null, got []"),
        ("vision", 3, "an object or null, got 3"),
        ("vision", {}, "vision: missing 'hidden_size'"),
        ("vision", {"hidden_size": 1, "parts": [{}]}, "vision: parts[0]: missing 'hidden_size'"),
        ("vision", {"hidden_size": 1, "parts": [3]}, "vision: parts: expected a list, each an obj"),
        ("vision", {"hidden_size": 0}, "vision: hidden_size: expected an int of at least 1, got 0"),
    ],
)
def test_a_wrong_type_says_key_expected_and_got(key: str, value: Any, expected: str) -> None:
    text = failure({**GOOD, key: value})
    assert text.startswith(WHERE)
    assert expected in text


def test_values_that_change_the_maths_are_all_listed() -> None:
    text = failure({**GOOD, "hidden_act": "relu", "attention_bias": True, "rope_scaling": {"a": 1}})
    assert 'hidden_act="relu" (supported: "silu", "gelu")' in text
    assert "attention_bias=true (supported: false)" in text
    assert 'rope_scaling={"a": 1} (supported: null)' in text
    assert read(hidden_act="gelu", attention_bias=False, rope_scaling=None)


def test_numbers_that_no_model_has_are_refused() -> None:
    """They would be written as a dimension, or as so many layers."""
    text = failure({**GOOD, "hidden_size": 2**31})
    assert "hidden_size: expected an int of at least 1, got 2147483648 (too large)" in text
    assert "(too large)" in failure({**GOOD, "pad_token_id": -(10**400)})

    @dataclass(frozen=True)
    class Deep:
        num_hidden_layers: Layers = 12

    assert read_config(Deep, {"num_hidden_layers": 1000}, WHERE).num_hidden_layers == 1000
    with raises(ConfigError, "config.wrong-value", "1", "1000", "1001"):
        read_config(Deep, {"num_hidden_layers": 1001}, WHERE)


def test_true_is_not_one_in_must_be() -> None:
    assert "attention_bias=0 (supported: false)" in failure({**GOOD, "attention_bias": 0})


def test_everything_wrong_is_raised_at_once() -> None:
    text = failure({"hidden_size": "a", "layer_norm_eps": [], "hidden_act": "relu"})
    for part in ("missing 'num_hidden_layers'", "hidden_size:", "layer_norm_eps:", "hidden_act="):
        assert part in text


def test_a_long_value_is_cut() -> None:
    assert len(failure({**GOOD, "name": list(range(10_000))})) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*Text.__dataclass_fields__, *Text.must_be, "other"])


@settings(deadline=None)
@given(st.dictionaries(KEYS, JSON))
def test_any_values_give_a_config_or_a_config_error(raw: dict[str, Any]) -> None:
    try:
        config = read_config(Text, {**GOOD, **raw}, WHERE)
    except ConfigError:
        return
    assert config.hidden_size >= 1
    assert isinstance(config.layer_norm_eps, float)
