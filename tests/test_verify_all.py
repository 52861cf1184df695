"""`make verify-all` misses nothing, and says so where something fails.

Its second size of captioner is proven here in the precisions that ship by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tests import verify_all
from tests.verify_all import MODELS, Model, Result, check_model, small, timed
from vlmport.builtin import builtin_models
from vlmport.bundle.layouts import LAYOUTS
from vlmport.bundle.precisions import DEFAULT_PRECISIONS
from vlmport.checkpoint import Checkpoint
from vlmport.families import FAMILIES, family_of
from vlmport.parity import Row

SMALL = next(model for model in MODELS if model.write is small)


def test_every_family_layout_and_built_in_model_is_there(tmp_path: Path) -> None:
    families, layouts = set(), set()
    for number, model in enumerate(MODELS):
        family = family_of(Checkpoint.open(model.write(tmp_path / str(number))))
        families.add(type(family))
        layouts |= set(family.layouts)
    assert families == set(FAMILIES)
    assert layouts == set(LAYOUTS)
    trained = {model.name for model in MODELS if model.trained}
    assert trained == set(builtin_models())


def test_the_second_size_in_the_precisions_that_ship(tmp_path: Path) -> None:
    results = list(check_model(SMALL, tmp_path, DEFAULT_PRECISIONS))
    assert [one.problem for one in results if one.problem] == []
    checks = [("all", "export"), ("all", "probe"), ("all", "weights"), ("fp32", "verify")]
    assert [(one.layout, one.precision, one.check) for one in results] == [
        (layout, *check) for layout in ("hub", "components") for check in checks
    ]


def test_the_rest_of_the_tests_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no model is asked for alone, and under the variable that chooses it."""
    asked: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append((command, options["env"]))
        return SimpleNamespace(returncode=len(asked) - 1)

    monkeypatch.setattr(verify_all, "check_model", lambda model, folder: iter(()))
    monkeypatch.setattr(verify_all.subprocess, "run", run)
    assert verify_all.main(["--model", SMALL.name, "--fuzz-minutes", "0"]) == 0
    assert asked == []
    assert [verify_all.main(["--fuzz-minutes", "0"]) for _ in range(2)] == [0, 1]
    for command, environment in asked:
        assert "pytest" in command
        assert command[-1] == "tests"
        assert environment["VLMPORT_THOROUGH"] == "1"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "passed"),
        (AssertionError("two weights are off"), "FAILED: AssertionError: two weights are off"),
        (RuntimeError("a defect of ours"), "FAILED: RuntimeError: a defect of ours"),
    ],
    ids=["right", "wrong", "a defect"],
)
def test_what_fails_is_in_the_table_and_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    said: str,
) -> None:
    def run() -> None:
        if error is not None:
            raise error

    def checked(model: Model, folder: Path) -> Iterator[Result]:
        yield timed(model.name, "hub", "q8", "weights", run)
        yield timed(model.name, "hub", "fp32", "verify", lambda: None)

    monkeypatch.setattr(verify_all, "check_model", checked)
    code = verify_all.main(["--model", SMALL.name, "--fuzz-minutes", "0"])
    table = capsys.readouterr().out
    assert code == (error is not None)
    assert said in table
    assert f"2 checks, {int(error is not None)} failed" in table


class Found(NamedTuple):
    """Of a report, what verify-all looks at."""

    rows: tuple[Row, ...]
    failures: tuple[Row, ...]
    passed: bool = False
    summary: str = "what broke"


@pytest.mark.parametrize(
    ("precision", "broken", "allowed"),
    [
        ("q4", ["text alone"], True),
        ("q4", ["text alone", "text alone: position_ids"], False),
        (verify_all.MIX, ["text alone", "text alone"], True),
        ("q4f16", ["three pictures: padded_logits", "text of two turns"], True),
        ("q4f16", ["two pictures, two turns"], False),
        ("q8", ["text alone"], False),
        ("fp32", ["text alone"], False),
        ("q4", ["text alone", "drawn 51x17"], False),
        ("q4", ["drawn 51x17"], False),
        ("q4", [], False),
    ],
)
def test_what_was_never_asked_is_noted_at_few_bits_alone(
    monkeypatch: pytest.MonkeyPatch, precision: str, broken: list[str], allowed: bool
) -> None:
    named = [one.partition(": ") for one in broken]
    failures = tuple(Row(image, precision, rung or "first_logits", ()) for image, _, rung in named)
    rows = (*failures, Row("drawn 640x427", precision, "pixels", ()))
    monkeypatch.setattr(verify_all, "verify", lambda *_, **__: Found(rows, failures))
    result = timed(
        "m", "hub", precision, "verify", lambda: verify_all.climb(Path(), Path(), precision)
    )
    assert (result.problem is None) == allowed
    images = sorted({row.image for row in failures})
    assert result.note == (f"but for {', '.join(images)}" if allowed else None)
