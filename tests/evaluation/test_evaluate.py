"""A bundle is measured, judged by what rounding may cost, and its figures are written down."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result
from onnx import numpy_helper
from rich.console import Console
from typer.testing import CliRunner

import vlmport
from tests.thorough import cells
from vlmport import cli
from vlmport.bundle import CARD, MANIFEST, Bundle
from vlmport.cli import console
from vlmport.evaluation import Report, UnrecordedResultError, evaluate
from vlmport.evaluation.examples import SCENES, drawn_scenes
from vlmport.evaluation.report import LIMITS, accuracy_markdown, limit_of, losses
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        cli.app, ["eval", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"}
    )


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def card(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def ruin(folder: Path, file: str) -> None:
    """Shift every row of the 4-bit head: the graph runs, and its captions are wrong."""
    path = folder / file
    model = onnx.load(path)
    (head,) = [one for one in model.graph.node if "logits" in one.output]
    for tensor in model.graph.initializer:
        if tensor.name == head.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(np.roll(whole(tensor), 1, 0), tensor.name))
    onnx.save(model, path)
    raw = manifest(folder)
    raw["files"][file]["size"] = path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")


def whole(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)


# The rule


@pytest.mark.parametrize("limit", cells(100, rest=(300,)))
def test_rounding_costs_shapes_no_more_than_its_limit(shapes: Path, limit: int) -> None:
    """q8 within 1 point of fp32 and q4 within 3; of 300 scenes one is a third of a point."""
    report = evaluate(shapes, limit=limit, precisions=["fp32", "q8", "q4"], record=False)
    assert report.passed, report.losses
    assert {one.precision: one.limit for one in report.losses} == {"q8": 1.0, "q4": 3.0}
    assert report.figures["fp32"]["exact_match"] >= 97


def test_the_verdict_is_said_and_where_it_was_written(own: Path) -> None:
    done = run(own, "-p", "fp32,q8", "--limit", "8")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-2:] == [
        "passed: none lost more than it may",
        "one of 8 is 12.5 points, and a limit 1: take more",
    ]
    assert f"written into {own}: vlmport.json, README.md" in done.stderr
    enough = run(own, "-p", "fp32,q8", "--limit", "100", "--no-record").stdout.splitlines()
    assert enough[-1] == "passed: none lost more than it may"
    done = run(own, "-p", "fp32", "--limit", "8", "--no-record")
    assert "passed" not in done.stdout
    assert "written" not in done.stderr


def test_what_costs_more_fails(own: Path) -> None:
    ruin(own, "onnx/decoder_model_merged_q4.onnx")
    done = run(own, "-p", "fp32,q4", "--limit", "40")
    assert done.exit_code == 1
    assert re.search(
        r"broken: q4 loses \d\d\S* points of exact_match to fp32, it may lose 3", done.stdout
    )
    (entry,) = manifest(own)["accuracy"]
    assert entry["passed"] is False
    assert entry["figures"]["q4"]["exact_match"] < entry["figures"]["fp32"]["exact_match"] - 3
    assert "**lost more than 3**" in card(own)
    assert run("--help").exit_code == 0
    shown = CliRunner().invoke(cli.app, ["inspect", str(own)], env={"COLUMNS": "200"})
    assert "a limit is BROKEN" in shown.stdout


def test_a_point_is_exactly_a_point() -> None:
    figures = {
        "fp32": {"exact_match": 98.8, "cider_d": 500.0},
        "q8": {"exact_match": 97.8, "cider_d": 1.0},
        "q4": {"exact_match": 95.79, "cider_d": 1.0},
    }
    found = {one.precision: one for one in losses(figures, LIMITS)}
    assert found.keys() == {"q8", "q4"}
    assert found["q8"].points == 1.0
    assert found["q8"].passed
    assert found["q4"].points == 3.01
    assert not found["q4"].passed


def test_a_mix_may_lose_what_its_coarsest_part_may() -> None:
    assert limit_of(["q8", "q4", "fp32"]) == 3.0
    assert limit_of(["q8", "fp32"]) == 1.0
    assert limit_of(["fp32"]) is None


# What is measured


def test_captions_are_those_of_the_runtime(shapes: Path) -> None:
    """Each picture's, alone, whatever the batch; and the score is their share."""
    data = drawn_scenes(20)
    with VLM.open(shapes, precision="q4") as model:
        texts = tuple(model.caption(image).text for image in data.images())
    report = evaluate(shapes, limit=20, precisions=["q4"], batch_size=7, record=False)
    assert report.answers["q4"].captions == texts
    right = sum(t in one.references for t, one in zip(texts, data.examples, strict=True))
    assert report.figures == {"q4": {"exact_match": round(100 * right / 20, 2)}}
    points = f"{100 * right / 20:.2f}"
    assert repr(report) == f"Report(passed: {SCENES}, 20 images: q4 exact_match {points})"
    assert f"<tr><td>q4</td><td>{points}</td><td></td><td></td></tr>" in report._repr_html_()


def test_nothing_is_drawn_whatever_the_bundle_does_by_default(own: Path) -> None:
    before = evaluate(own, limit=10, precisions=["q4"], record=False)
    raw = manifest(own)
    raw["generation"]["defaults"] = {"do_sample": True, "temperature": 5.0, "seed": 1}
    (own / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
    assert evaluate(own, limit=10, precisions=["q4"], record=False).answers == before.answers


def test_pictures_with_captions(own: Path, pictures: Path, tmp_path: Path) -> None:
    """Two captions of a picture, one of them wrong; a third picture's caption is half right."""
    captions = json.loads((pictures / "captions.json").read_text())
    names = list(captions)
    captions[names[0]] = ["something else", captions[names[0]]]
    captions[names[1]] = captions[names[1]].replace("pink", "green").replace("large", "small")
    (pictures / "captions.json").write_text(json.dumps(captions))
    out = tmp_path / "result.json"
    arguments = [own, pictures, "--metric", "exact-match", "--metric", "rouge-l", "-p", "fp32,q8"]
    done = run(*arguments, "--metric", "cider-d", "--json", out)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["figures"]["fp32"]["exact_match"] == 87.5
    assert 95 < result["figures"]["fp32"]["rouge_l"] < 100
    assert 700 < result["figures"]["fp32"]["cider_d"] < 1000
    assert [one["picture"] for one in result["examples"]] == names
    first, second = result["examples"][:2]
    assert first["scores"]["q8"] == {"exact_match": 1, "rouge_l": 1, "cider_d": pytest.approx(5)}
    assert second["captions"]["fp32"] == "a large yellow circle on a pink background"
    assert second["scores"]["fp32"]["exact_match"] == 0
    assert "rouge-score 0.1" in result["by"]
    assert (tmp_path / "own" / CARD).read_text().count("| `q8` | 87.50 | 9") == 1
    assert "on my &#124; &lt;pictures&gt;, 8 images" in card(own)


@pytest.mark.parametrize("mix", ["auto", "vision=q8,decoder=q4,embed=q4"])
def test_a_mix_is_measured_under_its_name(
    shapes: Path, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A console keeps the width of the COLUMNS that it found when it was made.
    monkeypatch.setattr(console.stdout, "_width", 200)
    report = evaluate(shapes, limit=5, precisions=["fp32", mix], record=False)
    name = "vision_encoder=q8,embed_tokens=q4,decoder_model_merged=q4"
    assert list(report.figures) == ["fp32", name]
    assert report.limits == {name: 3.0}
    done = run(shapes, "--limit", 5, "-p", mix, "--no-record")
    assert done.exit_code == 0
    assert name in done.stdout
    assert "fp32 was not measured, so nothing was compared with it" in done.stdout


# What is recorded


def test_figures_stand_in_the_manifest_and_the_card(own: Path) -> None:
    before = contents(own)
    evaluate(own, limit=10, precisions=["fp32", "q4"])
    bundle = Bundle.open(own, check_hashes=True)
    (entry,) = bundle.manifest.accuracy
    assert entry["data"] == SCENES
    assert entry["pictures"] == 10
    assert set(entry["figures"]) == {"fp32", "q4"}
    text = card(own)
    assert accuracy_markdown([entry]) in text
    assert "Not measured yet" not in text
    assert "Not verified yet" in text
    after = contents(own)
    assert {name for name in after if after[name] != before.get(name)} == {CARD, MANIFEST}
    shown = CliRunner().invoke(cli.app, ["inspect", str(own)], env={"COLUMNS": "200"})
    assert f"{SCENES}, 10 images, cpu: within its limits" in shown.stdout


@pytest.mark.parametrize(
    ("precisions", "metric", "said"),
    [
        (["q4"], "exact_match", "nothing compared with fp32"),
        (["fp32"], "exact_match", "nothing compared with fp32"),
        (["fp32", "q4"], "cider_d", "nothing compared with fp32"),
        (["fp32", "q4"], "exact_match", "within its limits"),
    ],
)
def test_inspect_claims_no_limit_that_nothing_was_held_against(
    own: Path, precisions: list[str], metric: str, said: str
) -> None:
    evaluate(own, limit=3, precisions=precisions, metrics=[metric])
    shown = CliRunner().invoke(cli.app, ["inspect", str(own)], env={"COLUMNS": "200"})
    assert f"{SCENES}, 3 images, cpu: {said}" in shown.stdout


def test_later_precisions_join_the_earlier_ones(own: Path, pictures: Path) -> None:
    """fp32 of an earlier run is what q4 is held against; other pictures keep their own table."""
    evaluate(own, limit=10, precisions=["fp32"])
    out = io.StringIO()
    report = evaluate(own, limit=10, precisions=["q4"], console=Console(file=out, width=120))
    assert [one.precision for one in report.losses] == ["q4"]
    assert "fp32 (recorded)" in out.getvalue()
    evaluate(own, pictures, precisions=["q8"])
    evaluate(own, limit=11, precisions=["fp32"])
    evaluate(own, limit=10, precisions=["q4"])
    entries = manifest(own)["accuracy"]
    assert [(one["data"], one["pictures"], [*one["figures"]]) for one in entries] == [
        ("my | <pictures>", 8, ["q8"]),
        (SCENES, 11, ["fp32"]),
        (SCENES, 10, ["fp32", "q4"]),
    ]
    assert card(own).count("| precision | exact match % |") == 2


def test_other_pictures_under_the_same_names_are_another_set(own: Path, pictures: Path) -> None:
    """What was measured on the old ones says nothing of the new ones."""
    evaluate(own, pictures, precisions=["fp32"])
    shutil.copyfile(pictures / "yellow_circle.png", pictures / "red_square.png")
    report = evaluate(own, pictures, precisions=["q4"])
    assert report.losses == []
    assert [[*one["figures"]] for one in manifest(own)["accuracy"]] == [["fp32"], ["q4"]]


def test_earlier_figures_keep_their_programs(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with figures of two versions names both; measured anew, only the new one."""
    monkeypatch.setattr("vlmport.evaluation.__version__", "0.0.7")
    evaluate(own, limit=3, precisions=["fp32"])
    monkeypatch.undo()
    evaluate(own, limit=3, precisions=["q4"])
    (entry,) = manifest(own)["accuracy"]
    now = f"vlmport {vlmport.__version__}, onnxruntime {onnxruntime.__version__}"
    assert entry["by"] == f"{now}, vlmport 0.0.7"
    evaluate(own, limit=3, precisions=["fp32", "q4"])
    (entry,) = manifest(own)["accuracy"]
    assert entry["by"] == now


def test_twice_is_the_same_as_once(own: Path) -> None:
    evaluate(own, limit=5, precisions=["fp32", "q8"])
    once = contents(own)
    evaluate(own, limit=5, precisions=["fp32", "q8"])
    assert contents(own) == once


def test_nothing_is_recorded_unless_asked(own: Path) -> None:
    before = contents(own)
    assert run(own, "--limit", 3, "-p", "q8", "--no-record").exit_code == 0
    assert contents(own) == before


def test_a_folder_that_cannot_be_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vlmport.evaluation.write_result", full)
    out = io.StringIO()
    with pytest.raises(UnrecordedResultError, match="No space left") as caught:
        evaluate(own, limit=3, precisions=["q8"], console=Console(file=out))
    assert "q8" in out.getvalue()
    assert isinstance(caught.value.report, Report)


# Nothing is lost


def test_pictures_that_cannot_be_read(own: Path, pictures: Path, tmp_path: Path) -> None:
    """The others are measured; a figure of a part is not written into the bundle."""
    (pictures / "red_square.png").write_bytes(b"not a picture")
    before = contents(own)
    out = tmp_path / "result.json"
    done = run(own, pictures, "-p", "fp32,q8", "--json", out)
    assert done.exit_code == 2
    assert done.stderr.count("red_square.png: not an image") == 1
    assert "error[evaluation.incomplete]: 1 of 8 " in done.stderr
    assert "7 images" in done.stdout
    result = json.loads(out.read_text())
    assert result["examples"][0]["captions"] == {"fp32": None, "q8": None}
    assert result["figures"]["q8"] == {"rouge_l": 100}
    assert contents(own) == before
    assert run(own, pictures, "-p", "q8", "--no-record").exit_code == 2


def test_no_picture_that_can_be_read(own: Path, pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        path.write_bytes(b"not a picture")
    done = run(own, pictures, "-p", "q8")
    assert done.exit_code == 2
    assert "error[evaluation.incomplete]: none of the 8 " in done.stderr


def test_what_is_done_is_kept_when_the_rest_is_interrupted(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = VLM.caption_each

    def interrupted(self: VLM, *args: Any, **options: Any) -> Iterator[Any]:
        if self.precision == "q4":
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    monkeypatch.setattr(VLM, "caption_each", interrupted)
    before = contents(own)
    out = tmp_path / "result.json"
    assert run(own, "--limit", 4, "-p", "fp32,q4", "--json", out).exit_code == 130
    assert set(json.loads(out.read_text())["figures"]) == {"fp32"}
    assert contents(own) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_json_on_a_full_disk(own: Path) -> None:
    """The work goes on, and the bundle has its figures."""
    done = run(own, "--limit", 3, "-p", "fp32,q8", "--json", "/dev/full")
    assert done.exit_code == 2
    assert "error[output.unwritable]: --json /dev/full: No space left on device" in done.stderr
    assert "q8" in done.stdout
    assert set(manifest(own)["accuracy"][0]["figures"]) == {"fp32", "q8"}


def test_a_built_in_name_is_exported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    done = run("shapes", "--limit", 3, "-p", "q8,auto")
    assert done.exit_code == 0, done.output
    assert "held-out scenes of shapes, 3 images" in done.stdout
