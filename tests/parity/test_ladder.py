"""Whole bundles pass; a bundle that is broken on one rung fails on that rung first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.parity import breaks
from tests.parity.breaks import DECODER, VISION
from tests.parity.conftest import Case, assert_first_broken, failing, value
from tests.parity.surgery import copied, edit_graph, edit_tensor, swap_outputs
from vlmport.bundle import Bundle
from vlmport.errors import VerificationError
from vlmport.exporter import export
from vlmport.parity import verify
from vlmport.parity.ladders import run_ladder
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.limits import LOGITS
from vlmport.parity.references import load_reference
from vlmport.parity.report import Report
from vlmport.parity.truth import Truth


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_green(tmp_path: Path, projection: Any, spelling: Any) -> None:
    """Three pictures, none of the model's own size, all rungs, against the real checkpoint."""
    checkpoint = write_prefix_checkpoint(
        tmp_path / "checkpoint", projection=projection, spelling=spelling, config={"max_length": 8}
    )
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    report = verify(bundle, checkpoint)
    assert report.passed, report.summary
    assert len(report.rows) == 3 * len(HubLadder.rungs)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F16"},
        {"dtype": "BF16", "shards": 2, "module_prefix": True},
        {"lora": False},
        {"config": {"lora_r": 4, "lora_alpha": 16}},
        {"config": {"lora_target_modules": ["q_proj", "down_proj"]}},
        {"text": {"tie_word_embeddings": False, "rope_theta": 300.0, "attention_bias": True}},
        {"text": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "eos_token_id": [5, 0]}},
        {"vision": {"vision_use_head": False, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}},
    ],
    ids=str,
)
def test_other_checkpoints_are_green(tmp_path: Path, tiny: Case, changes: dict[str, Any]) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "checkpoint", **changes)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    reference = load_reference(checkpoint, image_token_id=bundle.manifest.prompt.image_token_id)
    report = Report("", run_ladder(reference, bundle, ["fp32"], [tiny.request]))
    assert report.passed, report.summary


def test_tiny_is_whole(tiny: Case) -> None:
    """Before anything is broken; and its tokens differ, so that a wrong one can show."""
    report = tiny.climb(tiny.bundle)
    assert report.passed, report.summary
    assert len(set(tiny.truth.made.tokens.tolist())) > 4


@pytest.mark.parametrize(("rung", "damage"), breaks.BUNDLE, ids=lambda x: getattr(x, "__name__", x))
def test_broken_bundle(tiny: Case, broken: Bundle, rung: str, damage) -> None:
    assert_first_broken(tiny.climb(damage(broken, "fp32")), rung)


@pytest.mark.parametrize(
    ("rung", "damage"), breaks.RUNTIME, ids=lambda x: getattr(x, "__name__", x)
)
def test_broken_runtime(tiny: Case, monkeypatch: pytest.MonkeyPatch, rung: str, damage) -> None:
    damage(monkeypatch, len(tiny.truth.prompt_ids))
    assert_first_broken(tiny.climb(tiny.bundle), rung)


def test_small_faults(tiny: Case, tmp_path: Path) -> None:
    """Seen in fp32, where nothing is rounded; what LoRA with another scale does, at its least."""

    def zero(head: np.ndarray) -> np.ndarray:
        head[:, 90] = 0
        return head

    def fresh() -> Bundle:
        return copied(tiny.bundle, tmp_path / str(len(list(tmp_path.iterdir()))))

    bias = edit_tensor(fresh(), breaks.VISION, "projection.projection.bias", lambda x: x + 0.01)
    assert_first_broken(tiny.climb(bias), "vision_features")
    name = "layers.1.self_attn.o_proj.weight"
    scale = breaks.scaled(fresh(), breaks.DECODER, name, 1.01, "fp32")
    assert_first_broken(tiny.climb(scale), "first_logits")
    row = edit_tensor(fresh(), breaks.DECODER, "lm_head.weight", zero)
    assert_first_broken(tiny.climb(row), "first_logits")


def test_features_that_are_no_numbers(tiny: Case, broken: Bundle) -> None:
    """The worst of several pictures is then none either."""
    change = np.float32(np.nan)
    bias = edit_tensor(broken, breaks.VISION, "projection.projection.bias", lambda x: x * change)
    report = tiny.climb(bias)
    assert_first_broken(report, "vision_features")
    assert failing(report, "vision_features") == {"worst", "typical"}


def test_wrong_image_token(tiny: Case, broken: Bundle) -> None:
    """Through verify itself, which hands the manifest's id to the reference."""
    report = verify(breaks.wrong_image_token(broken, "fp32"), tiny.checkpoint)
    assert report.first_broken is not None
    assert report.first_broken.rung == "prompt_ids"


def test_every_embedding_row_is_seen(tiny: Case, broken: Bundle) -> None:
    """Each picture compares a third of the table; together they see any row."""
    broken = breaks.swap_embeddings(broken, "fp32")
    report = verify(broken, tiny.checkpoint, precisions=["fp32"])
    assert {row.rung for row in report.failures} == {"merged_embeds"}
    assert len(report.failures) == 2  # rows 40 and 41 belong to two pictures


# A mistake in reading config.json is the same as another config.json.


@pytest.mark.parametrize(
    ("rung", "misread"),
    [
        ("vision_features", {"vision": {"hidden_act": "gelu"}}),
        ("vision_features", {"vision": {"layer_norm_eps": 1e-5}}),
        ("first_logits", {"text": {"rms_norm_eps": 1e-4}}),
        ("first_logits", {"text": {"rope_theta": 10100.0}}),
        ("first_logits", {"config": {"lora_alpha": 9}}),
        ("first_logits", {"lora": "fresh"}),
    ],
    ids=str,
)
def test_slightly_wrong_everywhere(
    tiny: Case, tmp_path: Path, rung: str, misread: dict[str, Any]
) -> None:
    """The gentlest faults of an exporter: GELU by tanh or not, an epsilon, the rotary base, LoRA
    with another scale or left out. No single number is far off."""
    untied = {"tie_word_embeddings": False}
    settings = {"text": untied, "config": {"max_length": 12}}
    changes = {
        name: {**settings.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in misread.items()
    }
    checkpoint = write_prefix_checkpoint(tmp_path / "checkpoint", **(settings | changes))
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    report = tiny.climb(bundle)
    assert_first_broken(report, rung)
    assert {row.rung for row in report.failures} <= {rung, "cached_decode", *HubLadder.names()[-2:]}


def test_four_bits_unpacked_wrongly(tiny: Case, broken: Bundle) -> None:
    """The head's low and high halves of bytes swapped. (A matrix further down would not do: what
    a random model says hardly depends on any one of them.)"""
    whole = tiny.climb(tiny.bundle, "q4")
    edit_tensor(
        broken,
        DECODER,
        "lm_head.weight_quantized",
        lambda packed: (packed >> 4) | (packed << 4),
        precision="q4",
    )
    damaged = tiny.climb(broken, "q4")
    limit = LOGITS.four_bits["kl"]
    assert limit.holds(value(whole, "first_logits", "kl"))
    assert not limit.holds(value(damaged, "first_logits", "kl"))
    assert_first_broken(damaged, "first_logits")
    assert tiny.climb(broken, "fp32").passed


def test_four_bit_embeddings_shifted(tiny: Case, broken: Bundle) -> None:
    """A zero point that is off by one step."""

    def shift(packed: np.ndarray) -> np.ndarray:
        low, high = (packed + 1) & 15, ((packed >> 4) + 1) & 15
        return low | high << 4

    edit_tensor(broken, "embed_tokens", "weight_quantized", shift, precision="q4")
    assert_first_broken(tiny.climb(broken, "q4"), "merged_embeds")


def test_caches_exchanged_in_four_bits(tiny: Case, broken: Bundle) -> None:
    """Seen even in a random model, where exchanged keys hardly change what is said."""
    edit_graph(broken, DECODER, lambda m: swap_outputs(m, "present.0.key", "present.1.key"), "q4")
    (row,) = (row for row in tiny.climb(broken, "q4").failures if row.rung == "cached_decode")
    assert [one.name for one in row.measures if not one.passed] == ["self kl", "bound kl"]
    assert tiny.climb(tiny.bundle, "q4").rows[HubLadder.names().index("cached_decode")].passed


def test_eight_bit_tower_without_a_weight(tiny: Case, broken: Bundle) -> None:
    edit_tensor(broken, VISION, "layers.1.mlp.fc2.weight_scales", np.zeros_like, precision="q4")
    assert_first_broken(tiny.climb(broken, "q4"), "vision_features")


@pytest.fixture
def lanczos(tmp_path: Path) -> tuple[Path, Bundle]:
    """A checkpoint whose processor resizes by Lanczos, and its bundle."""
    checkpoint = write_prefix_checkpoint(tmp_path / "checkpoint", config={"max_length": 4})
    half = [0.5, 0.5, 0.5]
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "resample": 1,
        "size": {"height": 30, "width": 30},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(processor))
    return checkpoint, export(checkpoint, tmp_path / "bundle", precisions="fp32")


@pytest.mark.parametrize(
    ("values", "levels", "failing"), [(4, 1, set()), (9, 1, {"wrong"}), (1, 2, {"levels"})]
)
def test_lanczos(tiny: Case, lanczos, values: int, levels: int, failing: set[str]) -> None:
    """A handful of values may be one level off, and no more; with other filters none may."""
    checkpoint, bundle = lanczos
    broken = breaks.levels_off(bundle, values, levels)
    report = verify(broken, checkpoint, images=[tiny.picture.image])
    rows = [row for row in report.rows if row.rung == "pixels"]
    assert rows
    for row in rows:
        assert {one.name for one in row.measures if not one.passed} == failing, row.describe()


# Findings that need words


def test_batches_alone(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the bound cache's own measure can see rows that are mixed up."""
    breaks.cache_that_mixes_rows(monkeypatch, 0)
    report = tiny.climb(tiny.bundle)
    assert {row.rung for row in report.failures} == {"cached_decode"}
    assert failing(report, "cached_decode") == {"bound"}


def test_margins_are_given(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks.cache_that_forgets(monkeypatch, len(tiny.truth.prompt_ids))
    (row,) = (row for row in tiny.climb(tiny.bundle).failures if row.rung == "greedy_tokens")
    assert re.fullmatch(
        r"token \d+: \d+ \(bundle's margin [\d.]+\), reference \d+ \(margin [\d.]+\)", row.detail
    )


def test_an_exception_is_a_finding(tiny: Case, broken: Bundle) -> None:
    """Not a traceback: the rung is named, the others are still tried."""
    report = tiny.climb(breaks.two_pictures_asked(broken, "fp32"))
    assert report.first_broken.error.startswith("PromptError: ")
    assert [row.rung for row in report.failures] == ["end_to_end"]


@pytest.mark.parametrize("method", ["embeds", "logits"])
def test_an_exception_of_the_reference_is_not(
    tiny: Case, broken: Bundle, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(tiny.reference), method, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.climb(breaks.stops_early(broken, "fp32"))


def test_stop_is_told_from_another_token(tiny: Case, broken: Bundle) -> None:
    report = tiny.climb(breaks.stops_early(broken, "fp32"))
    assert report.first_broken.detail == (
        "stop ids [0, 44], the reference [0]; 3 tokens, the reference 12, equal up to there"
    )


def test_a_reference_that_contradicts_itself(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generate counts positions itself: those that the ladder uses must be the same."""
    kind, plain = type(tiny.reference), type(tiny.reference).position_ids
    monkeypatch.setattr(kind, "position_ids", lambda self, *a: plain(self, *a) // 2)
    with raises(VerificationError, "verify.reference-contradicts-itself"):
        Truth.of(tiny.reference, tiny.request, 4, tiny.bundle.manifest.prompt.image_token_id)


def test_where_new_tokens_stand_hangs_on_no_stop_token(
    tiny: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.reference, "stop_token_ids", ())
    token = tiny.bundle.manifest.prompt.image_token_id
    assert Truth.of(tiny.reference, tiny.request, 4, token).offset == tiny.truth.offset == 0
