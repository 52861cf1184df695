"""Stored names → plain names: wrappers off, LoRA pairs apart, nothing of PEFT ignored."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.errors import raises
from vlmport.checkpoint.names import Names, canonical_names
from vlmport.errors import AdapterError, VlmportError, WeightError

Q = "lm.base_model.model.model.layers.0.self_attn.q_proj"
PAIR = [f"{Q}.base_layer.weight", f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight"]
PLAIN_Q = "lm.model.layers.0.self_attn.q_proj.weight"


def failure(names: list[str], kind: type[WeightError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        canonical_names(names, "model")
    assert caught.value.hint
    assert str(caught.value).startswith("model: ")
    return str(caught.value)


def test_plain_names_stay() -> None:
    names = ["a.weight", "base_model.weight", "model.model.norm.weight", "lm.module.weight"]
    assert canonical_names(names, "model") == Names({name: name for name in names})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module."])
def test_wrappers_in_front_come_off(prefix: str) -> None:
    assert canonical_names([f"{prefix}a.weight", "b"], "x").plain == {
        "a.weight": f"{prefix}a.weight",
        "b": "b",
    }


def test_wrappers_of_parts_come_off_but_a_part_may_be_called_module() -> None:
    names = ["lm._orig_mod.a", "vision._fsdp_wrapped_module.b", "lm.module.c"]
    assert list(canonical_names(names, "x").plain) == ["lm.a", "vision.b", "lm.module.c"]


def test_peft_names_are_unwrapped_and_pairs_set_apart() -> None:
    names = [*PAIR, f"{Q}.base_layer.bias", "lm.base_model.model.lm_head.weight", "vision.x"]
    result = canonical_names([f"module.{name}" for name in names], "model")
    assert result.plain == {
        PLAIN_Q: f"module.{PAIR[0]}",
        PLAIN_Q.replace("weight", "bias"): f"module.{names[3]}",
        "lm.lm_head.weight": f"module.{names[4]}",
        "vision.x": "module.vision.x",
    }
    assert result.pairs == {PLAIN_Q: (f"module.{PAIR[1]}", f"module.{PAIR[2]}")}
    assert result.adapter == "default"


def test_a_model_wrapped_at_its_root() -> None:
    names = ["base_model.model.a.base_layer.weight", "base_model.model.a.lora_A.x.weight"]
    result = canonical_names([*names, "base_model.model.a.lora_B.x.weight"], "model")
    assert list(result.pairs) == ["a.weight"]
    assert result.adapter == "x"


def test_an_adapter_file_has_no_adapter_name_and_no_base() -> None:
    names = ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"]
    result = canonical_names(names, "adapter", pairs_only=True)
    assert result.plain == {}
    assert result.pairs == {"a.weight": (names[0], names[1])}


def test_two_names_for_one_weight() -> None:
    facts = "1 names", "'a.weight' is 'a.weight', 'module.a.weight'"
    with raises(WeightError, "weights.ambiguous", *facts):
        canonical_names(["module.a.weight", "a.weight", "b"], "model")
    text = failure([*PAIR, "module." + PAIR[1]], WeightError)
    assert "lora_A" in text


def test_several_adapters_are_listed() -> None:
    extra = [name.replace("default", "french") for name in PAIR[1:]]
    assert "expected one adapter, got 2 adapters: 'default', 'french'" in failure([*PAIR, *extra])


@pytest.mark.parametrize(
    "artefact",
    [
        f"{Q}.lora_magnitude_vector.default.weight",
        f"{Q}.lora_magnitude_vector",
        f"{Q}.lora_A.default.bias",
        f"{Q}.lora_B.default.bias",
        f"{Q}.lora_A",
        f"{Q}.lora_A.default.weight.absmax",
        "lm.base_model.model.embed_tokens.lora_embedding_A.default",
        "lm.base_model.model.embed_tokens.lora_embedding_B.default",
        f"{Q}.lora_E.default",
        f"{Q}.lora_diag.default.weight",
        "lm.base_model.model.lm_head.modules_to_save.default.weight",
        "lm.base_model.model.lm_head.original_module.weight",
        "lm.base_model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        f"{Q}.ia3_l.default",
        f"{Q}.vera_lambda_b.default",
        "prompt_encoder.default.embedding.weight",
    ],
)
def test_what_is_not_a_plain_pair_is_refused_by_name(artefact: str) -> None:
    text = failure([*PAIR, artefact])
    assert "not plain LoRA pairs" in text
    assert artefact in text


def test_half_a_pair() -> None:
    for names, half in ((PAIR[:2], "A"), ([PAIR[0], PAIR[2]], "B")):
        with raises(AdapterError, "adapter.incomplete", "1 LoRA tensors", f"q_proj.lora_{half}'"):
            canonical_names(names, "model")


def test_a_pair_without_its_base_suggests_a_near_name() -> None:
    text = failure([*PAIR[1:], "lm.model.layers.0.self_attn.q_prj.weight"])
    assert "1 LoRA pairs without a base weight" in text
    assert "did you mean 'lm.model.layers.0.self_attn.q_prj.weight'" in text


def test_a_wrapped_weight_whose_pair_was_dropped() -> None:
    bare = Q.replace(".0.", ".1.") + ".base_layer.weight"
    text = failure([*PAIR, bare])
    assert "1 weights that PEFT wrapped have no LoRA pair" in text
    assert bare in text


PARTS = st.sampled_from(
    ["module", "base_model", "model", "q", "base_layer", "weight", "lora_A", "lora_B", "default"]
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=6).map(".".join), unique=True, max_size=6))
def test_every_name_is_used_once_or_refused(stored: list[str]) -> None:
    try:
        names = canonical_names(stored, "model")
    except VlmportError:
        return
    used = [*names.plain.values(), *(half for pair in names.pairs.values() for half in pair)]
    assert sorted(used) == sorted(stored)


@given(st.lists(st.text("lora_AB.é ", max_size=12), unique=True, max_size=5))
def test_any_names_are_sorted_or_refused(stored: list[str]) -> None:
    with contextlib.suppress(VlmportError):
        canonical_names(stored, "model")
