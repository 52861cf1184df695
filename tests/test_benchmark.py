"""`vlmport bench`: every figure is there, Python's share is told apart, what can't run is said."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.errors import raises
from vlmport import cli
from vlmport.benchmark import FIGURES, Report, bench
from vlmport.benchmark.machine import describe_machine, interleaved, peak_memory
from vlmport.benchmark.measure import Bench, Run, TimedComponents, python_milliseconds
from vlmport.benchmark.picture import gradient
from vlmport.bundle import Bundle
from vlmport.errors import BundleError, OptionError
from vlmport.runtime.graphs.components import DECODER, EMBED, Components

QUICK = {"rounds": 1, "new_tokens": 2}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_every_figure_of_every_precision(bundle: Bundle) -> None:
    seen: list[tuple[int, int]] = []
    report = bench(
        bundle,
        lengths=(9, 4),
        cold=False,
        progress=lambda done, total, _: seen.append((done, total)),
        **QUICK,
    )
    alone = {"image_ms", "encode_ms", "python_ms", "size_mb"}
    by_length = {f"{name}@{n}" for name in ("prefill_ms", "decode_tokens_per_s") for n in (4, 9)}
    assert set(report.figures) == {"auto", *bundle.manifest.precisions}
    for figures in report.figures.values():
        assert set(figures) == alone | by_length
        assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert {name.partition("@")[0] for name in alone | by_length} <= set(FIGURES)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert report.machine["versions"]["onnxruntime"]
    table = report.lines()
    assert len(table) == 1 + len(alone | by_length)
    assert table[0].split() == list(report.figures)
    assert any("prefill, ms at 9" in line for line in table)


def test_six_precisions_stand_in_eighty_columns() -> None:
    """Figures as slow and as large as a captioner's."""
    lengths = [f"{name}@{n}" for name in ("prefill_ms", "decode_tokens_per_s") for n in (100, 1100)]
    figures = [*(name for name in FIGURES if "@" not in name), *lengths]
    figures = [name for name in figures if name not in ("prefill_ms", "decode_tokens_per_s")]
    names = ["auto", "fp32", "fp16", "q8", "q4", "q4f16"]
    one = dict.fromkeys(figures, 2243.1) | {"image_ms": 12.34, "python_ms": 0.376}
    lines = Report("b", {}, {}, dict.fromkeys(names, one), ()).lines()
    assert all(len(line) <= 80 for line in lines)
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == names
    (prefill,) = [line for line in lines if line.startswith("prefill, ms at 1100 ")]
    assert prefill.split()[4:] == ["2243.1"] * 6


def test_a_process_of_its_own_gives_time_and_memory(bundle: Bundle) -> None:
    report = bench(bundle, precisions=["q4"], lengths=(), **QUICK)
    figures = report.figures["q4"]
    assert figures["cold_s"] > 0.1  # Python alone takes that
    assert 20 < figures["peak_mb"] < 2000


def test_a_process_that_fails_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmport.benchmark.COLD_TOKENS", 10**6)
    with raises(BundleError, "benchmark.process-failed", "context"):
        bench(bundle, precisions=["q4"], lengths=(), **QUICK)


def test_what_the_context_has_no_room_for_is_left_out_with_a_word(bundle: Bundle) -> None:
    context = bundle.manifest.dims.context_length
    report = bench(
        bundle, precisions=["q4"], lengths=(context - 2, context - 1), cold=False, **QUICK
    )
    assert f"prefill_ms@{context - 2}" in report.figures["q4"]
    assert f"prefill_ms@{context - 1}" not in report.figures["q4"]
    assert report.notes == (
        f"{context - 1} tokens and 2 more are past the model's context of {context}",
    )


def test_the_time_between_runs_is_pythons() -> None:
    """Three tokens with 1, 2 and 40 ms of Python; a median is not moved by the last."""
    runs, clock = [Run(DECODER, 0.0, 5.0)], 5.0
    for python in (0.001, 0.002, 0.040):
        runs.append(Run(EMBED, clock + python / 2, clock + python / 2 + 0.1))
        runs.append(Run(DECODER, clock + python + 0.1, clock + python + 3.1))
        clock = runs[-1].end
    assert python_milliseconds(runs) == pytest.approx(2.0)


@pytest.mark.parametrize("inside", [True, False], ids=["in ONNX Runtime", "in Python"])
def test_pythons_share_is_told_apart(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A sleep of 100 ms a token, in a run of ONNX Runtime or beside it."""
    components = TimedComponents.open(bundle, precision="q4", threads=1)
    one = Bench(components, gradient(40, 30), (), 5)
    if inside:
        timed = components.session(EMBED)
        plain = timed._session

        class Slow:
            def run(self, *arguments):
                time.sleep(0.1)
                return plain.run(*arguments)

        timed._session = Slow()
    else:
        embed = Components.embed
        monkeypatch.setattr(Components, "embed", lambda *a: (time.sleep(0.1), embed(*a))[1])
    python = one.measures["python_ms"]()
    assert python < 50 if inside else python >= 100


def test_rounds_are_run_to_and_fro() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert interleaved(calls, 3) == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert "".join(order) == "abccbaabc"


def test_the_machine_is_described() -> None:
    facts = describe_machine(2, ["numpy", "no-such-package"])
    assert facts["cpu"]
    assert facts["threads"] == 2
    assert facts["versions"] == {"numpy": np.__version__, "no-such-package": None}
    peak = peak_memory()
    held = np.ones(30_000_000, np.uint8)
    assert peak is None or (peak_memory() or 0) >= max(peak, held.nbytes)


def test_the_command_prints_a_table_and_then_one_line_of_json(tiny_bundle: Path) -> None:
    done = run(
        tiny_bundle,
        "-p",
        "fp32,q4",
        "--tokens",
        5,
        "--tokens",
        10**5,
        "--rounds",
        1,
        "--new-tokens",
        2,
        "--no-cold",
        "--threads",
        1,
    )
    assert done.exit_code == 0
    *table, line = done.stdout.splitlines()
    report = json.loads(line)
    assert set(report["figures"]) == {"fp32", "q4"}
    assert report["machine"]["threads"] == 1
    assert table[2].split() == ["fp32", "q4"]
    assert len(table) == 3 + len(report["figures"]["q4"])
    assert "left out: 100000 tokens and 2 more are past the model's context" in done.stderr


def test_a_mix_of_precisions_is_one_column(tiny_bundle: Path) -> None:
    done = run(
        tiny_bundle, "-p", "vision=fp32,decoder=q4", "--tokens", 5, "--rounds", 1, "--no-cold"
    )
    assert set(json.loads(done.stdout.splitlines()[-1])["figures"]) == {"vision=fp32,decoder=q4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "no such folder"),
        (["BUNDLE", "-p", "q3"], "precision 'q3' is not in this bundle"),
        (["BUNDLE", "--tokens", "0"], "'--tokens'"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(
    tiny_bundle: Path, arguments: list[str], message: str
) -> None:
    done = run(*(str(tiny_bundle) if one == "BUNDLE" else one for one in arguments))
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "hint: " in done.stderr
    assert done.stdout == ""


def test_numbers_out_of_range(bundle: Bundle) -> None:
    for wrong in ({"rounds": 0}, {"new_tokens": 1}, {"threads": 0}, {"lengths": (2.5,)}):
        with pytest.raises(OptionError):
            bench(bundle, cold=False, **{**QUICK, **wrong})
