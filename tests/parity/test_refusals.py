"""What transformers refuses is a row where the bundle was asked too, and one line where not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.checkpoints import write_json
from tests.parity.qwen import Family
from tests.parity.surgery import copied
from tests.qwen_checkpoints import write_qwen3
from vlmport import cli
from vlmport.errors import ImageError, VerificationError
from vlmport.parity.asked import Request
from vlmport.parity.ladders import run_ladder
from vlmport.parity.pictures import Picture, drawn_pictures
from vlmport.parity.report import Report, parity_markdown
from vlmport.runtime.graphs.components import Components

STRIP = Picture("strip", Image.new("RGB", (900, 3)))  # 300 times as wide as high
(PICTURE,) = drawn_pictures([(60, 40)])
ASKED = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},)


@pytest.fixture
def qwen(qwens: dict[str, Family]) -> Family:
    return qwens["qwen3"]


def climb(family: Family, *pictures: Picture) -> Report:
    requests = [Request(one.name, (one,), ASKED) for one in pictures]
    return Report("", run_ladder(family.reference, family.bundle, ["fp32"], requests))


def test_both_refuse_a_strip(qwen: Family) -> None:
    """Qwen-VL takes no picture that is 200 times as wide as high; it was a traceback."""
    report = climb(qwen, STRIP, PICTURE)
    assert report.passed, report.summary
    (row,) = (row for row in report.rows if row.image == "strip")
    assert row.rung == "end_to_end"
    assert row.detail is not None
    assert row.detail.startswith("both refuse it; transformers: ValueError: ")
    assert "the bundle: ImageError" in row.detail
    assert "\n" not in row.detail
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    assert f"passed: all {len(report.rows)} checks" in out.getvalue()
    assert "| end_to_end | 0 wrong tokens" in parity_markdown(report.to_json())


def test_where_nothing_else_was_asked_nothing_passed(qwen: Family) -> None:
    report = climb(qwen, STRIP)
    assert not report.passed
    assert "| end_to_end | both refuse |" in parity_markdown(report.to_json())
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    assert report.summary in out.getvalue()
    assert "passed" not in out.getvalue() + report.summary


def test_transformers_alone_refuses(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(qwen.reference.processor)  # type: ignore[attr-defined]

    def refuses(*args: Any, **options: Any) -> Any:
        raise ValueError("no such\npicture")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", refuses)
        report = climb(qwen, PICTURE)
    assert not report.passed
    (row,) = report.rows
    assert row.error is not None
    assert "ValueError: no such picture" in row.error


def test_the_bundle_alone_refuses(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **options: Any) -> Any:
        raise ImageError("no", code="image.unreadable")

    monkeypatch.setattr(Components, "process_image", refuses)
    report = climb(qwen, PICTURE)
    assert not report.passed
    assert {row.rung for row in report.failures} >= {"pixels", "end_to_end"}


def test_a_template_for_one_turn_is_refused_by_both(qwen: Family, tmp_path: Path) -> None:
    """verify asks two turns; the template allows one."""
    path = "chat_template.jinja"
    one = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    bundle = copied(qwen.bundle, tmp_path / "bundle")
    template = one + (bundle.folder / path).read_text()
    settings = json.loads((bundle.folder / "tokenizer_config.json").read_text())
    write_json(bundle.folder / "tokenizer_config.json", {**settings, "chat_template": template})
    reference: Any = qwen.reference
    before, reference.processor.chat_template = reference.processor.chat_template, template
    text = {"type": "text", "text": "Why?"}
    turns = [{"role": role, "content": [text]} for role in ("user", "assistant", "user")]
    requests = [Request("turns", (), tuple(turns)), Request("turn", (), tuple(turns[:1]))]
    try:
        report = Report("", run_ladder(reference, bundle, ["fp32"], requests))
    finally:
        reference.processor.chat_template = before
    assert report.passed, report.summary
    (row,) = (row for row in report.rows if row.image == "turns")
    assert row.detail is not None
    assert "one turn" in row.detail


def test_a_model_that_can_not_run_says_nothing_of_the_bundle(
    qwen: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference: Any = qwen.reference

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(reference.model), "generate", fails)
    with pytest.raises(VerificationError, match="RuntimeError: out of memory") as caught:
        climb(qwen, PICTURE)
    assert caught.value.code == "verify.reference-fails"
    assert "generate" in str(caught.value)


def test_the_command_line_prints_one_line_and_a_hint(qwen: Family, tmp_path: Path) -> None:
    checkpoint = write_qwen3(tmp_path / "checkpoint")
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["text_config"]["hidden_act"] = "nothing"
    write_json(checkpoint / "config.json", raw)
    arguments = ["verify", str(qwen.bundle.folder), "--reference", str(checkpoint)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert "verify.reference-fails" in error
    assert hint.startswith("hint: ")
    assert "Traceback" not in done.output
