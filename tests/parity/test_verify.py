"""What verify says, writes and refuses."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.parity.conftest import Case
from tests.parity.surgery import edit_tensor
from vlmport import cli
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.bundle.layouts import LAYOUTS
from vlmport.errors import BundleError, DependencyError, ImageError, SourceError
from vlmport.parity import metrics, parity_markdown, verify
from vlmport.parity.ladders import LADDERS
from vlmport.parity.ladders.hub import HubLadder
from vlmport.parity.limits import Limit
from vlmport.parity.pictures import SIZES, drawn_pictures, named_pictures
from vlmport.parity.report import Measure, Report, Row
from vlmport.parity.rungs import CAUSES, ORDER, ROUNDED, WEIGHTS_RUNG
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.layouts import LAYOUTS as RUNTIMES


def test_a_pass_is_written_down(tiny: Case, broken: Bundle, tmp_path: Path) -> None:
    """Into vlmport.json and between the marks of the card, with the user's picture too."""
    mine = tmp_path / "mine.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 31, 4), np.uint8)).save(mine)
    out = io.StringIO()
    report = verify(
        broken, tiny.checkpoint, precisions=["fp32"], images=[mine], console=Console(file=out)
    )
    assert report.passed
    assert report.likely_cause is None
    assert report.summary.startswith("all 36 checks passed against transformers ")

    again = Bundle.open(broken.folder, check_hashes=True)
    parity = json.loads((broken.folder / "vlmport.json").read_text())["parity"]
    assert again.manifest.parity == parity == report.to_json()
    assert parity["passed"] is True
    assert [row["image"] for row in parity["rows"]][-1] == "mine.png"
    card = (broken.folder / "README.md").read_text()
    assert "Not verified yet" not in card
    assert parity_markdown(parity) in card
    assert "| first_logits | worst " in card
    assert "cached_decode" in out.getvalue()
    assert "broken" not in out.getvalue()

    verify(again, tiny.checkpoint, precisions=["fp32"])
    card = (broken.folder / "README.md").read_text()
    assert card.count("| first_logits |") == 1
    assert "mine.png" not in card


def test_a_failure_is_written_and_explained(tiny: Case, broken: Bundle) -> None:
    edit_tensor(broken, "vision_encoder", "post_layernorm.bias", lambda bias: bias + 1)
    out = io.StringIO()
    console = Console(file=out, width=200)
    report = verify(str(broken.folder), tiny.checkpoint, precisions=["fp32"], console=console)
    assert not report.passed
    assert report.first_broken is not None
    assert report.first_broken.rung == "vision_features"
    assert report.likely_cause == CAUSES["vision_features"]
    assert "first broken: vision_features, fp32, drawn 640x427: worst " in report.summary
    assert "likely cause: a weight of the vision tower" in out.getvalue()
    parity = Bundle.open(broken.folder, check_hashes=True).manifest.parity
    assert parity is not None
    assert parity["passed"] is False
    assert "| vision_features | **failed**: worst " in (broken.folder / "README.md").read_text()


@pytest.mark.parametrize(("width", "beside"), [(80, 2), (120, 3), (200, 6)])
def test_rungs_are_whole_however_narrow_the_terminal(width: int, beside: int) -> None:
    """Five precisions at 80 columns once left of first_logits 'first_log…'."""
    rows = [
        Row("a", precision, rung, (Measure("typical", 4.23e-7, Limit(5e-6, "std", "")),))
        for precision in SUFFIXES
        for rung in HubLadder.names()
    ]
    out = io.StringIO()
    Report("transformers", tuple(rows)).print(Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    heads = [line.replace("┃", " ").split()[1:] for line in lines if "┃ rung" in line]
    assert [name for some in heads for name in some] == list(SUFFIXES)
    assert max(map(len, heads)) == min(beside, len(SUFFIXES))
    for rung in HubLadder.names():
        assert sum(line.startswith(f"│ {rung} ") for line in lines) == len(heads)
    assert lines[-1] == f"passed: all {len(rows)} checks"


def test_the_verdict_is_said(tiny: Case, broken: Bundle) -> None:
    """And where it was written."""
    run = CliRunner().invoke
    arguments = ["verify", str(broken.folder), "--reference", str(tiny.checkpoint), "-p", "fp32"]
    done = run(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "passed: all 27 checks" in done.stdout
    assert f"written into {broken.folder}: vlmport.json, README.md" in done.stderr
    edit_tensor(broken, "vision_encoder", "post_layernorm.bias", lambda bias: bias + 1)
    done = run(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert re.search(r"failed: \d+ of 27 checks\nbroken vision_features", done.stdout)


def test_all_precisions_by_default(tiny: Case, broken: Bundle) -> None:
    """Rounded weights leave prompt, pixels and positions exact."""
    report = verify(broken, tiny.checkpoint)
    assert {row.precision for row in report.rows} == {"fp32", "q4"}
    for row in report.rows:
        if row.rung in ("prompt_ids", "pixels", "position_ids"):
            assert row.passed, row.describe()
    names = [{m.name for m in row.measures} for row in report.rows if row.rung == "first_logits"]
    assert names == [{"worst", "typical"}] * 3 + [{"kl", "top1"}] * 3


def test_adapter(tiny: Case, tmp_path: Path) -> None:
    """Merged at export and left to PEFT by the reference; without it, the decoder differs."""
    from tests.parity.test_reference import peft_folder
    from vlmport.exporter import export

    adapter = peft_folder(tmp_path / "adapter")
    bundle = export(tiny.checkpoint, tmp_path / "bundle", precisions="fp32", adapter=adapter)
    assert verify(bundle, tiny.checkpoint, adapter=adapter).passed
    report = verify(bundle, tiny.checkpoint)
    assert report.first_broken is not None
    assert report.first_broken.rung == "first_logits"


def test_another_checkpoint_is_refused_early(tiny: Case, tmp_path: Path) -> None:
    text = {"hidden_size": 48, "num_hidden_layers": 3}
    other = write_prefix_checkpoint(tmp_path / "other", text=text)
    facts = ("hidden_size is 48, the bundle's 32", "num_hidden_layers is 3, the bundle's 2")
    with raises(SourceError, "verify.other-checkpoint", *facts) as caught:
        verify(tiny.bundle, other)
    assert caught.value.hint is not None


def test_what_is_refused(tiny: Case, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        verify(tiny.bundle, tmp_path / "nowhere")
    with raises(BundleError, "bundle.no-manifest", "vlmport.json"):
        verify(tmp_path, tiny.checkpoint)
    with raises(BundleError, "precision.not-in-bundle", "'q8'"):
        verify(tiny.bundle, tiny.checkpoint, precisions=["q8"])
    with pytest.raises(ImageError):
        verify(tiny.bundle, tiny.checkpoint, images=[tmp_path / "nothing.png"])


def test_another_pillow(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its resize may be another: pixels that differ then say nothing of the bundle."""
    major = int(PIL.__version__.split(".")[0])
    monkeypatch.setattr(PIL, "__version__", f"{major - 1}.3.0")
    with pytest.raises(DependencyError, match=rf"Pillow {major}, installed is {major - 1}\.3"):
        verify(tiny.bundle, tiny.checkpoint)
    monkeypatch.setattr(PIL, "__version__", f"{major}.99.0")
    with pytest.raises(SourceError):
        verify(tiny.bundle, "nowhere/at/all")


def test_revision_is_for_the_hub(tiny: Case) -> None:
    with raises(SourceError, "source.no-revision", "'v1'"):
        verify(tiny.bundle, tiny.checkpoint, revision="v1")


def test_pictures_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name / "cat.png" for name in "abc"]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (8, 9)).save(path)
    names = [picture.name for picture in named_pictures([*paths, Image.new("RGB", (4, 4))])]
    assert names == ["cat.png", "cat.png (2)", "cat.png (3)", "picture 4"]


def test_one_precision_at_a_time(
    tiny: Case, broken: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of a precision are closed before those of the next open; torch's threads stay."""
    opened: list[Components] = []
    plain = Components.session

    def session(self: Components, component: str) -> Any:
        if self not in opened:
            assert not any(other.opened for other in opened)
            opened.append(self)
        return plain(self, component)

    monkeypatch.setattr(Components, "session", session)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 3)
    seen: list[tuple[int, int, str]] = []
    try:
        report = verify(broken, tiny.checkpoint, progress=lambda *what: seen.append(what))
        assert torch.get_num_threads() == before + 3
    finally:
        torch.set_num_threads(before)
    assert [one.precision for one in opened] == ["fp32", "q4"]
    assert not any(one.opened for one in opened)
    assert seen[0] == (0, 54, "reference, drawn 640x427")
    assert seen[-1] == (54, 54, "q4, drawn 51x17")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert len(report.rows) == 54 + 3  # the weights of three components at q4


def test_random_weights_are_a_likely_cause_where_fp32_passed() -> None:
    bad = Measure("kl", 0.5, Limit(0.2, "nats", ""))
    good = Row("a", "fp32", "first_logits", ())
    report = Report("x", (good, Row("a", "q4", "first_logits", (bad,))))
    assert report.likely_cause == f"{ROUNDED}; otherwise {CAUSES['first_logits']}"
    assert Report("x", report.rows[1:]).likely_cause == CAUSES["first_logits"]
    broken_too = Row("a", "fp32", "end_to_end", (bad,))
    assert ROUNDED not in str(Report("x", (*report.rows, broken_too)).likely_cause)


def test_without_torch(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("families.prefix.reference", "parity.references.loading"):
        monkeypatch.delitem(sys.modules, f"vlmport.{module}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError) as caught:
        verify(tiny.bundle, tiny.checkpoint)
    assert caught.value.hint == 'pip install "vlmport[verify]"'


def test_every_layout_has_graphs_that_run_and_a_ladder() -> None:
    assert set(RUNTIMES) == set(LADDERS) == set(LAYOUTS)
    for layout in LAYOUTS.values():
        assert set(layout.many_rows) <= set(layout.components)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rung_has_limits_and_a_cause(layout: str) -> None:
    """At every precision that there is; one more wants limits of its own."""
    assert set(SUFFIXES) == {"fp32", "fp16", "q8", "q4", "q4f16"}
    for rung, precision in itertools.product(LADDERS[layout].rungs, SUFFIXES):
        limits = rung.limits.at(precision)
        assert limits, rung
        assert all(limit.reason for limit in limits.values()), rung
        assert rung.cause


def test_every_cause_is_that_of_a_rung() -> None:
    names = {name for ladder in LADDERS.values() for name in ladder.names()}
    assert set(CAUSES) == {WEIGHTS_RUNG, *names}


def test_a_mix_is_judged_as_four_bits_and_pixels_by_their_filter() -> None:
    limits = {rung.name: rung.limits for rung in HubLadder.rungs}
    mix = "vision=q8,decoder=q4"
    assert limits["cached_decode"].at(mix) == limits["cached_decode"].at("q4")
    assert limits["cached_decode"].at(mix) != limits["cached_decode"].at("q8")
    for precision in SUFFIXES:
        assert set(limits["pixels"].at(precision, "lanczos")) == {"wrong", "levels"}
        assert set(limits["pixels"].at(precision, "bicubic")) == {"wrong"}


def test_pictures_have_three_sizes_and_do_not_change() -> None:
    pictures = drawn_pictures()
    assert tuple(picture.image.size for picture in pictures) == SIZES
    for first, second in zip(pictures, drawn_pictures(), strict=True):
        np.testing.assert_array_equal(first.rgb, second.rgb)
        assert first.rgb.std(axis=(0, 1)).min() > 20


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_never_passes(value: float) -> None:
    for limit in (Limit(1, "", ""), Limit(0, "", ""), Limit(-1, "", "", at_least=True)):
        if not (limit.at_least and value > 0):
            assert not limit.holds(value)
    right = Row("a", "fp32", "pixels", (Measure("error", 0.5, Limit(1, "", "")),))
    row = Row("b", "fp32", "pixels", (Measure("error", value, Limit(1, "", "")),))
    report = Report("x", (right, row))
    assert report.failures == (row,)
    assert "error not finite (≤ 1)" in report.summary
    text = json.dumps(report.to_json(), allow_nan=False)
    assert "error not finite (≤ 1)" in parity_markdown(json.loads(text))


def test_the_card_counts_no_component_among_the_inputs() -> None:
    """The rung of weights has a row a component, which no picture was needed for."""
    right = (Measure("wrong", 0, Limit(0, "", "")),)
    pixels = [Row(name, "q4", "pixels", right) for name in ("a", "b")]
    report = Report("x", (Row("decoder", "q4", "weights", right), *pixels))
    assert "on 2 inputs (a, b): " in parity_markdown(report.to_json())


def test_a_report_shows_itself_in_one_line_and_as_a_table() -> None:
    right, wrong = (
        Row(name, "q4", rung, (Measure("wrong", value, Limit(0, "values", "")),))
        for name, rung, value in (("<a>", "pixels", 0), ("<a>", "first_logits", 2))
    )
    assert repr(Report("torch 2", (right,))) == "Report(all 1 checks passed against torch 2)"
    report = Report("torch 2", (right, wrong))
    assert repr(report) == f"Report({report.summary})"
    table = report._repr_html_()
    assert "<tr><td>pixels</td><td>0 wrong values</td></tr>" in table
    assert "<tr><td>first_logits</td><td><b>failed: 2 wrong values</b></td></tr>" in table
    assert "&lt;a&gt;" in table
    assert "<a>" not in table


def test_nothing_compared_is_no_pass() -> None:
    assert not Report("x", ()).passed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rung_has_its_place_in_the_order(layout: str) -> None:
    names = LADDERS[layout].names()
    assert [rung for rung in ORDER if rung in names] == list(names)


def test_the_lowest_rung_is_named_whatever_its_row() -> None:
    def row(image: str, precision: str, rung: str) -> Row:
        return Row(image, precision, rung, (), error="X")

    rows = (row("a", "fp32", "end_to_end"), row("b", "q4", "pixels"), row("c", "fp32", "pixels"))
    assert Report("x", rows).first_broken == rows[1]


def test_metrics() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((5, 9)).astype(np.float32)
    other = truth + 0.1 * rng.standard_normal((5, 9)).astype(np.float32)
    assert metrics.unequal(truth, truth) == 0
    assert metrics.unequal(truth[:, :4], truth) == truth.size
    assert metrics.worst_error(truth, truth) == 0
    assert metrics.worst_error(truth[:2], truth) == math.inf
    assert metrics.typical_error(truth + 0.5, truth) == pytest.approx(0.5 / truth.std(), rel=1e-5)
    assert metrics.typical_error(truth[:2], truth) == math.inf
    assert metrics.least_cosine(2 * truth, truth) == pytest.approx(1)
    assert metrics.least_cosine(-truth, truth) == pytest.approx(-1)
    assert metrics.rounding_steps(truth, truth, 4) == 0
    assert metrics.rounding_steps(truth[:2], truth, 4) == math.inf
    step = np.abs(truth).max(-1, keepdims=True) / 8
    assert metrics.rounding_steps(truth + step / 2, truth, 4) == pytest.approx(0.5)
    assert metrics.rounding_steps(truth + step / 2, truth, 8) == pytest.approx(8)
    assert metrics.rounding_steps(truth, 0 * truth, 4) == math.inf
    assert metrics.rounding_steps(truth * np.float32(math.nan), 0 * truth, 4) == math.inf
    zeros = np.zeros((1, truth.shape[1]), np.float32)
    assert metrics.least_cosine(np.concatenate([truth, zeros]), truth) == -1
    for ours, expected in ((zeros, 1), (zeros + 1e-9, 0), (zeros * math.nan, math.nan)):
        found = metrics.least_cosine(np.concatenate([truth, ours]), np.concatenate([truth, zeros]))
        assert found == pytest.approx(expected, nan_ok=True)
    p, q = np.exp(metrics.log_softmax(truth)), np.exp(metrics.log_softmax(other))
    assert metrics.mean_divergence(other, truth) == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert metrics.mean_divergence(truth + 7, truth) == pytest.approx(0, abs=1e-6)
    assert metrics.agreement(truth, truth) == 1
    lead = np.array([[2.0, 1.98, 0], [2, 1.96, 0], [0, 1, 0], [math.nan, 1, 0]])
    assert metrics.agreement(lead[:, [1, 0, 2]], lead) == 0.25  # the near tie
    assert metrics.agreement(lead * math.nan, np.array([[1.0, 0, 0]] * 4)) == 0
    assert metrics.agreement(lead[:1], lead) == 0
    assert metrics.regret(truth.argmax(-1), truth) == 0
    worst = metrics.regret(truth.argmin(-1), truth)
    assert worst == pytest.approx((truth.max(-1) - truth.min(-1)).mean(), rel=1e-5)
    logits = np.log(np.array([0.5, 0.2, 0.3]))
    assert metrics.end_regret(logits, (0, 1)) == pytest.approx(0)
    assert metrics.end_regret(logits, (1, 7)) == pytest.approx(math.log(2.5))
    assert metrics.end_regret(logits, ()) == math.inf
    assert metrics.margin(np.array([1.0, 5.0, 3.5])) == 1.5
    assert (metrics.largest([1, 3.5, 2]), metrics.least([1, 0.5, 2])) == (3.5, 0.5)
    for values in ([0, math.nan], [math.nan, 0], [math.inf, math.nan]):
        assert math.isnan(metrics.largest(values))
        assert math.isnan(metrics.least(values))
