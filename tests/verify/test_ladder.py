"""Whole bundles pass; a bundle that is broken on one rung fails on that rung first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.verify.conftest import Tiny
from tests.verify.surgery import append_to_output, edit_graph, edit_tensor, renewed, swap_outputs
from vlmport.bundle import Bundle, Manifest
from vlmport.export import export
from vlmport.runtime.cache import KeyValueCache
from vlmport.runtime.components import Components
from vlmport.runtime.model import VLM
from vlmport.runtime.prompt import Prompter
from vlmport.verify import ladder, verify
from vlmport.verify.ladder import run_ladder
from vlmport.verify.limits import CLOSE, RUNGS
from vlmport.verify.reference import load_reference
from vlmport.verify.report import Report

VISION, DECODER = "vision_encoder", "decoder_model_merged"


def assert_first_broken(report: Report, rung: str) -> None:
    """It is this rung, and every rung below it passed."""
    assert report.first_broken is not None, "nothing broke"
    assert report.first_broken.rung == rung, report.summary
    assert [row.rung for row in report.rows] == list(RUNGS)


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
    assert len(report.rows) == 3 * len(RUNGS)


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
def test_other_checkpoints_are_green(tmp_path: Path, tiny: Tiny, changes: dict[str, Any]) -> None:
    checkpoint = write_prefix_checkpoint(tmp_path / "checkpoint", **changes)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32")
    reference = load_reference(checkpoint, image_token_id=bundle.manifest.prompt.image_token_id)
    model = VLM.open(bundle, precision="fp32")
    report = Report("", run_ladder(reference, {"fp32": model}, [tiny.picture]))
    assert report.passed, report.summary


def test_tiny_is_whole(tiny: Tiny) -> None:
    """Before anything is broken; and its tokens differ, so that a wrong one can show."""
    report = tiny.climb(tiny.bundle)
    assert report.passed, report.summary
    assert len(set(tiny.truth.made.tokens.tolist())) > 4


# Each entry breaks what one rung looks at and nothing below it.


def fewer_ids(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, "image_processor", "image_token_ids", lambda ids: ids[:-1])


def one_other_id(bundle: Bundle) -> Bundle:
    return edit_tensor(
        bundle,
        "image_processor",
        "image_token_ids",
        lambda ids: ids - np.eye(1, 25, 3, dtype=np.int64)[0],
    )


def wrong_image_token(bundle: Bundle) -> Bundle:
    """The reference's prompt is made with the manifest's id, the graph's with the true one."""

    def change(manifest: Manifest) -> Manifest:
        prompt = dataclasses.replace(manifest.prompt, image_token_id=7)
        return dataclasses.replace(manifest, prompt=prompt)

    return renewed(bundle, change)


def change_pixels(bundle: Bundle, operator: str, value: np.ndarray) -> Bundle:
    return edit_graph(
        bundle,
        "image_processor",
        lambda model: append_to_output(model, "pixel_values", operator, value),
    )


def no_mean(bundle: Bundle) -> Bundle:
    """(x - mean) / std, without the mean of 0.5, is one more."""
    return change_pixels(bundle, "Add", np.float32(1))


def other_std(bundle: Bundle) -> Bundle:
    return change_pixels(bundle, "Mul", np.float32(0.5 / 0.505))


def one_level_off(bundle: Bundle) -> Bundle:
    """One of 2,700 values, by the least that a resize can be wrong by: 1/255 of the range."""
    change = np.zeros((1, 3, 30, 30), np.float32)
    change[0, 1, 12, 20] = 2 / 255
    return change_pixels(bundle, "Add", change)


def bgr(bundle: Bundle) -> Bundle:
    """Swap red and blue at the graph's input."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                node.input[at] = "swapped" if name == "image" else name
        order = onnx.helper.make_tensor("order", onnx.TensorProto.INT64, [3], [2, 1, 0])
        model.graph.initializer.append(order)
        gather = onnx.helper.make_node("Gather", ["image", "order"], ["swapped"], axis=2)
        model.graph.node.insert(0, gather)

    return edit_graph(bundle, "image_processor", change)


def zero_vision_weight(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, VISION, "layers.1.mlp.fc2.weight", np.zeros_like)


def projection_bias(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, VISION, "projection.projection.bias", lambda bias: bias + 0.01)


def swap_embeddings(bundle: Bundle) -> Bundle:
    """Two of 113 rows."""

    def swap(table: np.ndarray) -> np.ndarray:
        table[[40, 41]] = table[[41, 40]]
        return table

    return edit_tensor(bundle, "embed_tokens", "embed_tokens.weight", swap)


def decoder_weight(bundle: Bundle) -> Bundle:
    """What LoRA merged with another scale would do, at its smallest."""
    return edit_tensor(bundle, DECODER, "layers.1.self_attn.v_proj.weight", lambda w: w * 1.01)


def zero_head_row(bundle: Bundle) -> Bundle:
    def zero(head: np.ndarray) -> np.ndarray:
        head[:, 90] = 0
        return head

    return edit_tensor(bundle, DECODER, "lm_head.weight", zero)


def caches_of_wrong_layers(bundle: Bundle) -> Bundle:
    return edit_graph(bundle, DECODER, lambda m: swap_outputs(m, "present.0.key", "present.1.key"))


def stops_early(bundle: Bundle) -> Bundle:
    """A stop id more than the model has: the third of the tokens that the reference makes."""

    def change(manifest: Manifest) -> Manifest:
        generation = dataclasses.replace(manifest.generation, stop_token_ids=(0, 44))
        return dataclasses.replace(manifest, generation=generation)

    return renewed(bundle, change)


def two_pictures_asked(bundle: Bundle) -> Bundle:
    """The manifest's caption messages hold a picture too many."""

    def change(manifest: Manifest) -> Manifest:
        prompt = dataclasses.replace(manifest.prompt, caption=manifest.prompt.caption * 2)
        return dataclasses.replace(manifest, prompt=prompt)

    return renewed(bundle, change)


BREAKS: list[tuple[str, Callable[[Bundle], Bundle]]] = [
    ("prompt_ids", fewer_ids),
    ("prompt_ids", one_other_id),
    ("pixels", no_mean),
    ("pixels", other_std),
    ("pixels", one_level_off),
    ("pixels", bgr),
    ("vision_features", zero_vision_weight),
    ("vision_features", projection_bias),
    ("merged_embeds", swap_embeddings),
    ("first_logits", decoder_weight),
    ("first_logits", zero_head_row),
    ("cached_decode", caches_of_wrong_layers),
    ("greedy_tokens", stops_early),
    ("end_to_end", two_pictures_asked),
]


@pytest.mark.parametrize(("rung", "damage"), BREAKS, ids=lambda x: getattr(x, "__name__", x))
def test_broken_bundle(tiny: Tiny, broken: Bundle, rung: str, damage) -> None:
    assert_first_broken(tiny.climb(damage(broken)), rung)


def test_wrong_image_token(tiny: Tiny, broken: Bundle) -> None:
    """Through verify itself, which hands the manifest's id to the reference."""
    report = verify(wrong_image_token(broken), tiny.checkpoint, precisions=["fp32"])
    assert report.first_broken is not None
    assert report.first_broken.rung == "prompt_ids"


def test_every_embedding_row_is_seen(tiny: Tiny, broken: Bundle) -> None:
    """Each picture compares a third of the table; together they see any row."""
    report = verify(swap_embeddings(broken), tiny.checkpoint, precisions=["fp32"])
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
    tiny: Tiny, tmp_path: Path, rung: str, misread: dict[str, Any]
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
    assert {row.rung for row in report.failures} <= {rung, "cached_decode", *RUNGS[-2:]}


def value(report: Report, rung: str, name: str) -> float:
    (row,) = (row for row in report.rows if row.rung == rung)
    return next(measure.value for measure in row.measures if measure.name == name)


def test_four_bits_unpacked_wrongly(tiny: Tiny, broken: Bundle) -> None:
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
    limit = CLOSE["first_logits"]["kl"]
    assert limit.holds(value(whole, "first_logits", "kl"))
    assert not limit.holds(value(damaged, "first_logits", "kl"))
    assert_first_broken(damaged, "first_logits")
    assert tiny.climb(broken, "fp32").passed


def test_four_bit_embeddings_shifted(tiny: Tiny, broken: Bundle) -> None:
    """A zero point that is off by one step."""

    def shift(packed: np.ndarray) -> np.ndarray:
        low, high = (packed + 1) & 15, ((packed >> 4) + 1) & 15
        return low | high << 4

    edit_tensor(broken, "embed_tokens", "weight_quantized", shift, precision="q4")
    assert_first_broken(tiny.climb(broken, "q4"), "merged_embeds")


def test_caches_exchanged_in_four_bits(tiny: Tiny, broken: Bundle) -> None:
    """Seen even in a random model, where exchanged keys hardly change what is said."""
    edit_graph(broken, DECODER, lambda m: swap_outputs(m, "present.0.key", "present.1.key"), "q4")
    (row,) = (row for row in tiny.climb(broken, "q4").failures if row.rung == "cached_decode")
    assert [measure.name for measure in row.measures if not measure.passed] == ["self kl"]
    assert tiny.climb(tiny.bundle, "q4").rows[RUNGS.index("cached_decode")].passed


def test_eight_bit_tower_without_a_weight(tiny: Tiny, broken: Bundle) -> None:
    edit_tensor(broken, VISION, "layers.1.mlp.fc2.weight_scales", np.zeros_like, precision="q4")
    assert_first_broken(tiny.climb(broken, "q4"), "vision_features")


# What no file holds is broken in the runtime itself.


def test_shifted_positions(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Components.position_ids
    monkeypatch.setattr(Components, "position_ids", lambda *a, **k: plain(*a, **k) + 1)
    report = tiny.climb(tiny.bundle)
    assert_first_broken(report, "position_ids")


def test_positions_that_restart(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at once, wrong after a cache."""
    plain = Components.position_ids
    monkeypatch.setattr(Components, "position_ids", lambda self, ids, past=0: plain(self, ids))
    assert_first_broken(tiny.climb(tiny.bundle), "position_ids")


def test_features_in_another_order(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ladder.merge_image_features
    monkeypatch.setattr(
        ladder,
        "merge_image_features",
        lambda embeds, ids, features, token: plain(embeds, ids, features[::-1], token),
    )
    report = tiny.climb(tiny.bundle)
    assert_first_broken(report, "merged_embeds")
    assert not tiny.climb(tiny.bundle, "q4").rows[3].passed


def test_cache_not_fed_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Components.decode

    def forgetful(self, embeds, mask, positions, past=None, num_logits_to_keep=0):
        past = past and {name: np.zeros_like(value) for name, value in past.items()}
        return plain(self, embeds, mask, positions, past, num_logits_to_keep)

    monkeypatch.setattr(Components, "decode", forgetful)
    report = tiny.climb(tiny.bundle)
    assert_first_broken(report, "cached_decode")
    assert [row.rung for row in report.failures] == ["cached_decode"]


def test_positions_that_restart_with_each_chunk(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Components.decode

    def restarting(self, embeds, mask, positions, past=None, num_logits_to_keep=0):
        positions = np.arange(embeds.shape[1])[None]
        return plain(self, embeds, mask, positions, past, num_logits_to_keep)

    monkeypatch.setattr(Components, "decode", restarting)
    assert_first_broken(tiny.climb(tiny.bundle), "cached_decode")


def test_logits_kept_of_the_wrong_row(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """num_logits_to_keep = 1 must give the last position's."""
    plain = Components.decode

    def first_row(self, embeds, mask, positions, past=None, num_logits_to_keep=0):
        logits, presents = plain(self, embeds, mask, positions, past)
        return logits[:, :num_logits_to_keep] if num_logits_to_keep else logits, presents

    monkeypatch.setattr(Components, "decode", first_row)
    assert_first_broken(tiny.climb(tiny.bundle), "cached_decode")


def test_runtime_cache_that_forgets(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own cache writes each new token over the last of the prompt."""
    plain, P = KeyValueCache.step, len(tiny.truth.prompt_ids)

    def stuck(self, embeds):
        self.lengths[:] = P - 1
        return plain(self, embeds)

    monkeypatch.setattr(KeyValueCache, "step", stuck)
    report = tiny.climb(tiny.bundle)
    assert_first_broken(report, "greedy_tokens")
    detail = report.first_broken.detail
    assert "bundle's margin" in detail
    assert "reference" in detail


def test_runtime_that_adds_a_token(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BOS before the picture, as some ports of this model have it."""
    plain = Prompter.encode
    monkeypatch.setattr(Prompter, "encode", lambda self, text: np.insert(plain(self, text), 0, 0))
    assert_first_broken(tiny.climb(tiny.bundle), "end_to_end")


def test_an_exception_is_a_finding(tiny: Tiny, broken: Bundle) -> None:
    """Not a traceback: the rung is named, the others are still tried."""
    report = tiny.climb(two_pictures_asked(broken))
    assert report.first_broken.error.startswith("PromptError: ")
    assert [row.rung for row in report.failures] == ["end_to_end"]


def test_stop_is_told_from_another_token(tiny: Tiny, broken: Bundle) -> None:
    report = tiny.climb(stops_early(broken))
    assert report.first_broken.detail == "3 tokens, the reference 12, equal up to there"
