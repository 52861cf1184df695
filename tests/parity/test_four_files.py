"""The ladder of the layout `components`: whole folders pass, each rung sees its own fault first."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.parity.conftest import Case
from tests.parity.surgery import (
    append_to_output,
    copied,
    edit_graph,
    edit_tensor,
    renewed,
    swap_outputs,
)
from vlmport.bundle import Bundle
from vlmport.bundle.layouts import COMPONENTS
from vlmport.errors import BundleError, SourceError
from vlmport.exporter import export
from vlmport.inspection import probe_bundle
from vlmport.parity import verify
from vlmport.parity.ladders import run_ladder
from vlmport.parity.ladders.components import FourFilesLadder
from vlmport.parity.protocol import HiddenStates
from vlmport.parity.report import Report
from vlmport.runtime.layouts.components import BEGIN, GO_ON, IMAGE, PROJECTION, VISION, FourFiles


@dataclass(frozen=True)
class FourCase:
    """The checkpoint of `tiny` in this layout; its truth is the same."""

    case: Case
    bundle: Bundle
    hidden: HiddenStates

    def climb(self, bundle: Bundle, precision: str = "fp32") -> Report:
        files, case = FourFiles.open(bundle, precision=precision), self.case
        ladder = FourFilesLadder(
            files, case.reference, case.request, case.truth, (0, 1), self.hidden
        )
        return Report(case.reference.versions, tuple(ladder.climb(precision)))


@pytest.fixture(scope="module")
def four(tiny: Case, tmp_path_factory: pytest.TempPathFactory) -> FourCase:
    out = tmp_path_factory.mktemp("four") / "bundle"
    bundle = export(tiny.checkpoint, out, precisions=("fp32", "q8", "q4"), layout=COMPONENTS)
    return FourCase(tiny, bundle, tiny.reference.hidden_states(tiny.truth.pictures[0].pixels))


@pytest.fixture
def broken(four: FourCase, tmp_path: Path) -> Bundle:
    """A copy, to be broken."""
    return copied(four.bundle, tmp_path / "broken")


def assert_first_broken(report: Report, rung: str) -> None:
    """It is this rung, and every rung below it passed."""
    assert report.first_broken is not None, "nothing broke"
    assert report.first_broken.rung == rung, report.summary
    assert [row.rung for row in report.rows] == list(FourFilesLadder.names())


@pytest.mark.parametrize(
    "changes",
    [
        {"projection": "mlp"},
        {"spelling": "v5", "dtype": "BF16"},
        {"lora": False, "text": {"tie_word_embeddings": False}},
        {"vision": {"vision_use_head": False}},
        {"vision": {"num_attention_heads": 8, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}},
        {"text": {"num_key_value_heads": 4, "eos_token_id": [5, 0], "attention_bias": True}},
    ],
    ids=str,
)
def test_green(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Three pictures, all rungs, against the real checkpoint; and the result is written down."""
    changes = {"config": {"max_length": 6}} | changes
    checkpoint = write_prefix_checkpoint(tmp_path / "checkpoint", **changes)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32", layout=COMPONENTS)
    report = verify(bundle, checkpoint)
    assert report.passed, report.summary
    assert len(report.rows) == 3 * len(FourFilesLadder.rungs)
    again = Bundle.open(bundle.folder)
    assert again.manifest.parity == report.to_json()
    assert again.manifest.layout == COMPONENTS
    assert "| projected_prefix |" in (bundle.folder / "README.md").read_text()


def test_half_is_green(four: FourCase, tmp_path: Path) -> None:
    bundle = export(four.case.checkpoint, tmp_path / "half", precisions="fp16", layout=COMPONENTS)
    report = four.climb(bundle, "fp16")
    assert report.passed, report.summary


@pytest.mark.parametrize("precision", ["q8", "q4"])
def test_rounded_vision_is_green(four: FourCase, precision: str) -> None:
    """A random decoder fails at few bits by nature; the rungs below it do not."""
    rows = four.climb(four.bundle, precision).rows
    below = rows[: FourFilesLadder.names().index("first_logits")]
    assert all(row.passed for row in below), [row.describe() for row in below]


# What files hold


def other_pixels(bundle: Bundle) -> Bundle:
    change = np.float32(0.5 / 0.505)
    return edit_graph(
        bundle, "image_processor", lambda m: append_to_output(m, "pixel_values", "Mul", change)
    )


def tower_without_a_weight(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, VISION, "layers.1.mlp.fc2.weight", np.zeros_like)


def heads_that_score_for_another(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, VISION, "attention.scores", lambda scores: scores[:, ::-1])


def pooled_before_its_mlp(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, VISION, "head.mlp.fc2.weight", np.zeros_like)


def no_pooler_output(bundle: Bundle) -> Bundle:
    def change(model: onnx.ModelProto) -> None:
        kept = [one for one in model.graph.output if one.name != "pooler_output"]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    return edit_graph(bundle, VISION, change)


def projection_a_little_off(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, PROJECTION, "projection.bias", lambda bias: bias + 0.01)


def swapped_rows(bundle: Bundle, component: str) -> Bundle:
    def swap(table: np.ndarray) -> np.ndarray:
        table[[40, 41]] = table[[41, 40]]
        return table

    return edit_tensor(bundle, component, "embed_tokens.weight", swap)


def rows_swapped_where_it_begins(bundle: Bundle) -> Bundle:
    return swapped_rows(bundle, BEGIN)


def rows_swapped_where_it_goes_on(bundle: Bundle) -> Bundle:
    return swapped_rows(bundle, GO_ON)


def decoder_without_a_weight(bundle: Bundle) -> Bundle:
    return edit_tensor(bundle, BEGIN, "layers.1.self_attn.o_proj.weight", np.zeros_like)


def text_before_the_prefix(bundle: Bundle) -> Bundle:
    """Without prompt ids it makes no difference."""

    def change(model: onnx.ModelProto) -> None:
        (concat,) = (node for node in model.graph.node if "prefix_embeddings" in node.input)
        concat.input[:] = concat.input[::-1]

    return edit_graph(bundle, BEGIN, change)


def caches_of_wrong_layers(bundle: Bundle) -> Bundle:
    return edit_graph(bundle, BEGIN, lambda m: swap_outputs(m, "present.0.key", "present.1.key"))


def a_step_without_a_weight(bundle: Bundle) -> Bundle:
    """The two graphs share their weights in one file; a graph can still be wrong by itself."""
    return edit_tensor(bundle, GO_ON, "layers.1.mlp.down_proj.weight", np.zeros_like)


def stops_early(bundle: Bundle) -> Bundle:
    return renewed(
        bundle,
        lambda m: dataclasses.replace(
            m, generation=dataclasses.replace(m.generation, stop_token_ids=(0, 44))
        ),
    )


BREAKS: list[tuple[str, Callable[[Bundle], Bundle]]] = [
    ("pixels", other_pixels),
    ("hidden_states", tower_without_a_weight),
    ("pooler_output", heads_that_score_for_another),
    ("pooler_output", pooled_before_its_mlp),
    ("pooler_output", no_pooler_output),
    ("projected_prefix", projection_a_little_off),
    ("embeddings", rows_swapped_where_it_begins),
    ("embeddings", rows_swapped_where_it_goes_on),
    ("first_logits", decoder_without_a_weight),
    ("prompted_logits", text_before_the_prefix),
    ("cached_decode", caches_of_wrong_layers),
    ("cached_decode", a_step_without_a_weight),
    ("greedy_tokens", stops_early),
]


@pytest.mark.parametrize(("rung", "damage"), BREAKS, ids=lambda x: getattr(x, "__name__", x))
def test_broken(four: FourCase, broken: Bundle, rung: str, damage) -> None:
    assert_first_broken(four.climb(damage(broken)), rung)


def test_tiny_is_whole(four: FourCase) -> None:
    report = four.climb(four.bundle)
    assert report.passed, report.summary


def test_between_the_files(four: FourCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that no file shows by itself: rows turned round on the way to the projection."""
    plain, truths = FourFiles.project, four.hidden.last
    monkeypatch.setattr(
        FourFiles,
        "project",
        lambda self, hidden: plain(self, hidden if hidden is truths else hidden[::-1]),
    )
    assert_first_broken(four.climb(four.bundle), "end_to_end")


def test_a_cache_that_is_not_fed_back(four: FourCase, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FourFiles.go_on

    def forgetful(self, ids, cache):
        return plain(self, ids, {name: np.zeros_like(value) for name, value in cache.items()})

    monkeypatch.setattr(FourFiles, "go_on", forgetful)
    assert_first_broken(four.climb(four.bundle), "cached_decode")


def test_four_bits_unpacked_wrongly(four: FourCase, broken: Bundle) -> None:
    """Of the pooling head, which has 4 bits; and of the embedding."""

    def swap(packed: np.ndarray) -> np.ndarray:
        return (packed >> 4) | (packed << 4)

    edit_tensor(broken, VISION, "head.mlp.fc2.weight_quantized", swap, precision="q4")
    assert_first_broken(four.climb(broken, "q4"), "pooler_output")
    edit_tensor(broken, BEGIN, "embed_tokens.weight_quantized", swap, precision="q4")
    failed = {row.rung for row in four.climb(broken, "q4").failures}
    assert {"pooler_output", "embeddings"} <= failed


def test_a_tied_head_shifted_by_a_level(tmp_path: Path) -> None:
    """In q8 the embedding is the head's matrix: half a step of a row is allowed, one is not."""
    checkpoint = write_prefix_checkpoint(tmp_path / "c", config={"max_length": 4})
    bundle = export(checkpoint, tmp_path / "out", precisions="q8", layout=COMPONENTS)
    name = "lm_head.weight_quantized"

    def embeddings(report: Report) -> bool:
        return all(row.passed for row in report.rows if row.rung == "embeddings")

    assert embeddings(verify(bundle, checkpoint))
    edit_tensor(bundle, GO_ON, name, lambda levels: levels + np.int8(1), precision="q8")
    assert not embeddings(verify(Bundle.open(bundle.folder), checkpoint))


def test_an_exception_is_a_finding(four: FourCase, broken: Bundle) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["other" if name == "inputs_embeds" else name for name in names]

    report = four.climb(edit_graph(broken, GO_ON, rename))
    assert_first_broken(report, "embeddings")
    assert report.first_broken is not None
    assert report.first_broken.error is not None
    assert "no value 'inputs_embeds'" in report.first_broken.error


@pytest.mark.parametrize(
    ("component", "prefix", "said"),
    [
        (IMAGE, "pixel_values", "image_processor: no output 'pixel_values'; it has other"),
        (VISION, "last_hidden", "vision_encoder: no output 'last_hidden_state'; it has other"),
        (PROJECTION, "projected", "projection: no output 'projected_prefix'; it has other"),
        (BEGIN, "logits", "prefix_init: no output 'logits'; it has other"),
        (BEGIN, "present.", "prefix_init: no output 'present.…'; it has logits, other"),
        (GO_ON, "logits", "language_model: no output 'logits'; it has other"),
    ],
)
def test_a_file_whose_output_has_another_name(
    broken: Bundle, component: str, prefix: str, said: str
) -> None:
    """Of another program's making, perhaps: said in one line."""

    def rename(model: onnx.ModelProto) -> None:
        names = [one.name for one in model.graph.output if one.name.startswith(prefix)]
        new = {name: f"other.{number}" for number, name in enumerate(names)}
        for node in model.graph.node:
            node.output[:] = [new.get(name, name) for name in node.output]
            node.input[:] = [new.get(name, name) for name in node.input]
        for one in model.graph.output:
            one.name = new.get(one.name, one.name)

    bundle = edit_graph(broken, component, rename)
    with pytest.raises(BundleError, match=re.escape(said)):
        probe_bundle(bundle, "cpu", Console(file=io.StringIO()))


def test_another_models_reference(four: FourCase) -> None:
    class Other:
        """Has no tower of its own to show."""

    with raises(SourceError, "verify.other-checkpoint"):
        run_ladder(Other(), four.bundle, ["fp32"], [])  # pyright: ignore
