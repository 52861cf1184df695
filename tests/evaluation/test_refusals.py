"""What `vlmport eval` refuses, and says so before the work where it can."""

from __future__ import annotations

from pathlib import Path

import vlmport
from tests.errors import raises
from tests.evaluation.test_evaluate import manifest, run
from vlmport.errors import BundleError, EvaluationError
from vlmport.evaluation import evaluate


def test_scenes_are_for_models_trained_on_them(tiny_bundle: Path) -> None:
    done = run(tiny_bundle)
    assert done.exit_code == 2
    assert "error[evaluation.not-trained-on-scenes]: none of the first 32 captions" in done.stderr
    assert "vlmport eval BUNDLE FOLDER" in done.stderr.partition("hint: ")[2]
    assert manifest(tiny_bundle).get("accuracy") is None


def test_bad_arguments_are_said_before_the_work(own: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["-p", "q5"], "precision 'q5' is not in this bundle"),
        (["--metric", "bleu"], "no metric 'bleu'"),
        (["--captions", "x.json"], "error[option.contradiction]: captions x.json"),
        ([str(tmp_path), "--questions"], "they are about drawn scenes only"),
        (["--questions"], "this captioner takes pictures and no text"),
        ([str(tmp_path / "none")], "no such folder"),
        (["--json", str(tmp_path / "no/x.json")], "error[output.unwritable]"),
        (["--device", "quantum"], "quantum"),
    ):
        done = run(own, *arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr, (arguments, done.stderr)
    for arguments in (["--limit", "0"], ["--batch-size", "0"]):
        assert run(own, *arguments).exit_code == 2
    assert "accuracy" not in manifest(own)


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    with raises(BundleError, "bundle.no-manifest"):
        evaluate(tmp_path)
    with raises(EvaluationError, "option.contradiction", "x.json"):
        evaluate(tmp_path, captions="x.json")


def test_a_layout_that_the_runtime_does_not_run(tmp_path: Path) -> None:
    bundle = vlmport.export("shapes", tmp_path / "out", precisions="fp32", layout="components")
    done = run(bundle.folder, "--limit", 3)
    assert done.exit_code == 2
    assert "written in the layout 'components', expected 'hub'" in done.stderr
