"""What `inspect` shows of bundles that nobody vouches for, and when a probe has proved nothing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlmport import cli
from vlmport.bundle import MANIFEST, Bundle, read_manifest
from vlmport.exporter import export
from vlmport.inspection import describe, probe_bundle

VISION = "onnx/vision_encoder.onnx"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Bundle:
    """The bundle after its manifest was changed; files are not compared with it."""
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
    return Bundle(folder, read_manifest(folder / MANIFEST))


def probe(bundle: Bundle) -> tuple[bool, str]:
    text = io.StringIO()
    return probe_bundle(bundle, "cpu", Console(file=text)), text.getvalue()


def test_a_type_that_onnx_has_no_name_for_is_shown(own_bundle_folder: Path) -> None:
    model = onnx.load(own_bundle_folder / VISION)
    model.graph.input[0].type.tensor_type.elem_type = 999
    onnx.save(model, own_bundle_folder / VISION)
    text = io.StringIO()
    manifest = read_manifest(own_bundle_folder / MANIFEST)
    describe(Bundle(own_bundle_folder, manifest), Console(file=text, width=200))
    assert "in  pixel_values type 999, unknown[batch_size, 3, 30, 30]" in text.getvalue()


def shown(bundle: Bundle) -> list[str]:
    text = io.StringIO()
    describe(bundle, Console(file=text, width=200))
    return text.getvalue().splitlines()


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([], "no checks"),
        ([{"precision": "fp32", "passed": False}], "FAILED"),
        ([{"precision": "fp32", "passed": True}, {"precision": "q4"}], "FAILED"),
        ([{"precision": "fp32", "passed": "yes"}], "FAILED"),
        ([{"precision": "fp32", "passed": True}], "passed"),
    ],
)
def test_parity_is_passed_only_by_its_rows(own_bundle_folder: Path, rows: Any, word: str) -> None:
    parity = {"reference": "torch 2", "passed": True, "rows": rows}
    lines = shown(edit(own_bundle_folder, lambda raw: raw.update(parity=parity)))
    assert f"parity           {word} against torch 2" in lines


def test_parity_is_shown_by_precision(own_bundle_folder: Path) -> None:
    rows = [
        {"precision": precision, "rung": rung, "passed": (precision, rung) != ("q4", "pixels")}
        for precision in ("fp32", "q4")
        for rung in ("pixels", "first_logits")
    ]
    parity = {"reference": "torch 2", "passed": False, "rows": [*rows, {}]}
    lines = shown(edit(own_bundle_folder, lambda raw: raw.update(parity=parity)))
    at = lines.index("parity           FAILED against torch 2")
    assert lines[at + 1 : at + 4] == [
        "  fp32           2 of 2 checks passed",
        "  q4             1 of 2 checks passed; broken: pixels",
        "  ?              0 of 1 checks passed; broken: ?",
    ]


def test_accuracy_is_shown_by_precision(own_bundle_folder: Path) -> None:
    assert "accuracy         not measured yet" in shown(edit(own_bundle_folder, lambda raw: None))
    entry = {
        "data": "cats [and dogs]",
        "pictures": 20,
        "sha256": "0" * 64,
        "device": "cpu",
        "by": "me",
        "passed": True,
        "figures": {
            "fp32": {"rouge_l": 41.5, "cider_d": 90, "of_tomorrow": 1},
            "q4": {"rouge_l": 40},
        },
        "limits": {"q4": 3},
    }
    lines = shown(edit(own_bundle_folder, lambda raw: raw.update(accuracy=[entry])))
    at = lines.index("accuracy         cats [and dogs], 20 images, cpu: within its limits")
    assert lines[at + 1 :] == [
        "  fp32           ROUGE-L 41.50, CIDEr-D 90.00, of_tomorrow 1.00",
        "  q4             ROUGE-L 40.00",
    ]


def test_what_only_some_precisions_have_is_marked(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The cache of float16 graphs is float16."""
    lines = shown(export(tiny_checkpoint, tmp_path / "out", precisions="fp32,fp16"))
    caches = [line.split(" cache tensors ")[1] for line in lines if "cache tensors" in line]
    assert [re.sub(r"\[.*\]", "", kind) for kind in caches] == [
        "float (fp32)",
        "float16 (fp16)",
    ] * 2
    (embeds,) = [line for line in lines if line.startswith("  in  inputs_embeds")]
    assert embeds.endswith("]")


def test_what_each_precision_fetches_is_shown(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    files, lines = bundle.manifest.files, shown(bundle)

    def size(*suffixes: str) -> str:
        """Of the graphs with these suffixes, and of all files that are no graphs."""
        graphs = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        names = [f"onnx/{graph}{end}.onnx" for graph, end in zip(graphs, suffixes, strict=True)]
        others = [name for name in files if ".onnx" not in name]
        names += [*others, "onnx/image_processor.onnx"]
        return f"{sum(files[name].size for name in names) / 1e6:.1f} MB"

    fp32, q8, q4 = (size(*[suffix] * 3) for suffix in ("", "_quantized", "_q4"))
    assert f"precisions       fp32 {fp32}, q8 {q8}, q4 {q4}" in lines
    (auto,) = [line for line in lines if line.startswith("auto on cpu ")]
    mixed = "vision_encoder q8, embed_tokens q4, decoder_model_merged q4"
    assert auto == f"auto on cpu      {mixed}; {size('_quantized', '_q4', '_q4')}"


def test_a_probe_without_any_golden_fails(own_bundle_folder: Path) -> None:
    edit(own_bundle_folder, lambda raw: raw["golden"].update(expected={}))
    done = CliRunner().invoke(cli.app, ["inspect", str(own_bundle_folder), "--probe"])
    assert done.exit_code == 1
    for precision in ("fp32", "q8", "q4"):
        assert f"probe {precision}: no golden is recorded, so nothing was run" in done.stdout


def test_a_probe_without_one_golden_fails(own_bundle_folder: Path) -> None:
    passed, text = probe(edit(own_bundle_folder, lambda raw: raw["golden"]["expected"].pop("q8")))
    assert not passed
    assert "probe q8: no golden is recorded" in text
    assert "fp32 on cpu: as recorded" in text
    assert "q4 on cpu: as recorded" in text


def test_a_probe_of_no_whole_precision_fails(own_bundle_folder: Path) -> None:
    def mix(raw: dict[str, Any]) -> None:
        del raw["components"]["vision_encoder"]["q4"]
        for precision in ("fp32", "q8"):
            del raw["components"]["decoder_model_merged"][precision]
        for choice in raw["auto"].values():
            choice |= {"vision_encoder": "q8", "decoder_model_merged": "q4"}

    passed, text = probe(edit(own_bundle_folder, mix))
    assert not passed
    assert "no precision of this bundle has all components" in text


@pytest.mark.parametrize("wrong", [{"copies": 10**11}, {"prefill_tokens": 10**11}])
def test_a_golden_that_would_take_all_memory_is_refused(
    own_bundle_folder: Path, wrong: dict[str, int]
) -> None:
    raw = json.loads((own_bundle_folder / MANIFEST).read_text(encoding="utf-8"))
    raw["golden"] |= wrong
    (own_bundle_folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
    done = CliRunner().invoke(
        cli.app, ["inspect", str(own_bundle_folder), "--probe"], catch_exceptions=False
    )
    assert done.exit_code == 2
    assert "golden" in done.stderr
    assert "hint: " in done.stderr
