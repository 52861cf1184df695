"""A result is written whole or not at all, and is never lost."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.parity.conftest import Case
from vlmport.bundle import CARD, MANIFEST, Bundle
from vlmport.cli import app, console
from vlmport.cli.console import verify_progress
from vlmport.parity import Report, UnrecordedError, parity_markdown, verify
from vlmport.parity.limits import Limit
from vlmport.parity.recording import record
from vlmport.parity.report import Measure, Row

REPORT = Report("x 1.0", (Row("a", "fp32", "pixels", (Measure("wrong", 0, Limit(0, "ids", "")),)),))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def full(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full when `record` comes to this file: half of it is written."""

    def fails(path: Path, text: Any, *args: Any, **kwargs: Any) -> int:
        if name in path.name:
            plain(path, text[: len(text) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return plain(path, text, *args, **kwargs)

    method = "write_bytes" if name == CARD else "write_text"
    plain = getattr(Path, method)
    monkeypatch.setattr(Path, method, fails)


@pytest.mark.parametrize("name", [CARD, MANIFEST])
def test_a_full_disk_changes_nothing(
    broken: Bundle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = {path: path.read_bytes() for path in broken.folder.glob("*.*")}
    files = names(broken.folder)
    full(monkeypatch, name)
    with pytest.raises(UnrecordedError, match="No space left") as caught:
        record(broken, REPORT)
    assert caught.value.report is REPORT
    assert names(broken.folder) == files
    assert {path: path.read_bytes() for path in before} == before
    assert Bundle.open(broken.folder, check_hashes=True).manifest.parity is None


def test_ctrl_c_leaves_nothing_partial(broken: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    files = names(broken.folder)
    monkeypatch.setattr("vlmport.bundle.recording.write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(broken, REPORT)
    assert names(broken.folder) == files


def test_links_are_replaced_and_blobs_left_alone(broken: Bundle, tmp_path: Path) -> None:
    """As the Hub's cache has them: a blob may be another snapshot's too."""
    blobs = {}
    for name in (CARD, MANIFEST):
        blob = tmp_path / f"blob of {name}"
        shutil.move(broken.folder / name, blob)
        (broken.folder / name).symlink_to(blob)
        blobs[blob] = blob.read_bytes()
    again = record(broken, REPORT)
    assert again.manifest.parity == REPORT.to_json()
    assert parity_markdown(REPORT.to_json()) in (broken.folder / CARD).read_text(encoding="utf-8")
    assert {blob: blob.read_bytes() for blob in blobs} == blobs
    assert not (broken.folder / CARD).is_symlink()


@pytest.mark.parametrize("text", [b"mine\n", b"", b"\xff not UTF-8\r\n"])
def test_a_card_without_marks_is_left_alone(broken: Bundle, text: bytes) -> None:
    (broken.folder / CARD).write_bytes(text)
    record(broken, REPORT)
    assert (broken.folder / CARD).read_bytes() == text


def test_a_card_is_written_once(broken: Bundle) -> None:
    """Between its marks, whatever ends its lines; a bundle without a card gets none."""
    card = broken.folder / CARD
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    record(record(broken, REPORT), REPORT)
    assert card.read_bytes().count(b"| pixels |") == 1
    assert b"Not verified yet" not in card.read_bytes()
    card.unlink()
    assert record(broken, REPORT).manifest.parity == REPORT.to_json()
    assert not card.exists()


# The report comes first


def unwritable(bundle: Bundle, report: Report) -> None:
    raise UnrecordedError(
        "it can't be written", hint="is it read-only?", code="bundle.unwritable", report=report
    )


def test_the_report_is_printed_before_it_is_recorded(
    tiny: Case, broken: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmport.parity.record", unwritable)
    out = io.StringIO()
    with pytest.raises(UnrecordedError) as caught:
        verify(broken, tiny.checkpoint, precisions=["fp32"], console=Console(file=out))
    assert "cached_decode" in out.getvalue()
    assert caught.value.report.passed


def test_nothing_is_lost_on_the_command_line(
    tiny: Case, broken: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table, the JSON, and last the one line that says why the bundle is as it was."""
    monkeypatch.setattr("vlmport.parity.record", unwritable)
    file = tmp_path / "result.json"
    arguments = ["verify", broken.folder, "--reference", tiny.checkpoint, "-p", "fp32"]
    done = run(*arguments, "--json", file)
    assert done.exit_code == 2
    assert "cached_decode" in done.stdout
    assert json.loads(file.read_text(encoding="utf-8"))["passed"] is True
    assert done.stderr.splitlines() == [
        "error[bundle.unwritable]: it can't be written",
        "hint: is it read-only?",
    ]


@pytest.mark.parametrize("place", ["a folder", "no/folder/x.json", "read-only"])
def test_json_that_cannot_be_written_is_said_before_the_work(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the work began")

    (tmp_path / "a folder").mkdir()
    (tmp_path / "read-only").write_text("mine", encoding="utf-8")
    monkeypatch.setattr("vlmport.parity.verify", never)
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: (mode != os.W_OK or path.name != "read-only") and allowed(path, mode),
    )
    done = run("verify", tiny.bundle.folder, "--reference", "x", "--json", tmp_path / place)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 2
    assert done.stderr.startswith("error[output.unwritable]: --json ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_json_on_a_full_disk(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmport.parity.verify", lambda *args, **options: REPORT)
    done = run("verify", tiny.bundle.folder, "--reference", "x", "--json", "/dev/full")
    assert done.exit_code == 2
    assert "error[output.unwritable]: --json /dev/full: No space left on device" in done.stderr


def test_revision_is_handed_on(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fake(*args: Any, **options: Any) -> Report:
        asked.update(options)
        return REPORT

    monkeypatch.setattr("vlmport.parity.verify", fake)
    done = run("verify", tiny.bundle.folder, "--reference", "a/b", "--revision", "v2")
    assert done.exit_code == 0
    assert asked["revision"] == "v2"


def test_a_bar_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone before the report is printed."""
    terminal = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=terminal, force_terminal=True, width=80))
    with verify_progress() as progress:
        assert progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with verify_progress() as progress:
        assert progress is not None
        progress(3, 27, "q4, cat.png")
        progress(27, 27, "q4, cat.png")
        assert "verifying q4, cat.png" in terminal.getvalue()
        assert "27/27" in terminal.getvalue()
