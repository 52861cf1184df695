"""Streams that fail, encodings that lack characters, and terminals that obey them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.text import Text

from tests.forked import Case, Result, run_cases
from vlmport.bundle import MANIFEST
from vlmport.cli.console import SafeConsole
from vlmport.cli.output import Output, to_json, visible

ESCAPES = "a\x1b]52;c;aGk=\x07b\x9b2Jc\u202ed\re\x7f"
NAME, SEEN = "a\x1b]52;c;aGk=b\x9b2Jc\u202ed", "a\ufffd]52;c;aGk=b\ufffd2Jc\ufffdd"


@pytest.fixture(scope="module")
def results(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All runs of the command line, in one process of forks."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("streams")
    for name in ("é 猫.png", "two.png", "\x1b]0;x\x9b.png"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    odd, two = str(folder / "é 猫.png"), str(folder / "two.png")
    hostile = folder / "hostile"
    hostile.mkdir()
    for path in tiny_bundle.rglob("*"):
        target = hostile / path.relative_to(tiny_bundle)
        target.mkdir() if path.is_dir() else os.link(path, target)
    manifest = json.loads((hostile / MANIFEST).read_text(encoding="utf-8"))
    (hostile / MANIFEST).unlink()
    (hostile / MANIFEST).write_text(json.dumps({**manifest, "name": NAME}), encoding="utf-8")
    model = ["-m", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "3"]
    both = ["caption", odd, two, *model]
    cases = {
        "caption": Case(both),
        "ascii": Case(both, encoding="ascii"),
        "json": Case([*both, "--json"], encoding="cp1252"),
        "full": Case([*both, "--json"], stdout="full"),
        "nobody": Case([*both, "--stream"], stdout="nobody"),
        "closed": Case(["ask", odd, *model], stdout="closed"),
        "no stderr": Case(["caption", str(folder / "none.png"), two, *model], stderr="full"),
        "stderr closed": Case(both, stderr="closed"),
        "chat without stdin": Case(["chat", *model], stdin=None),
        "help full": Case(["--help"], stdout="full"),
        "help nobody": Case(["caption", "--help"], stdout="nobody"),
        "help in ascii": Case(["caption", "--help"], encoding="ascii"),
        "inspect full": Case(["inspect", str(tiny_bundle)], stdout="full"),
        "inspect on a terminal": Case(["inspect", str(hostile)], stdout="terminal"),
        "inspect in a pipe": Case(["inspect", str(hostile)]),
        "error on a terminal": Case(
            ["inspect", str(folder / "\x1b]0;x\x9b.png")], stderr="terminal"
        ),
        "usage on a terminal": Case(["models", "\x1b]0;x\x9b"], stderr="terminal"),
    }
    done = run_cases(list(cases.values()))
    return dict(zip(cases, done, strict=True))


def test_a_character_that_the_encoding_lacks_is_replaced(results: dict[str, Result]) -> None:
    plain, ascii_only = results["caption"], results["ascii"]
    assert (plain.code, ascii_only.code, ascii_only.err) == (0, 0, "")
    assert ascii_only.out == plain.out.replace("é", "?").replace("猫", "?")
    assert results["help in ascii"].code == 0
    assert results["help in ascii"].out.startswith("Usage: ")


def test_json_is_exact_in_every_encoding(results: dict[str, Result]) -> None:
    done = results["json"]
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert (done.code, len(rows)) == (0, 2)
    assert Path(rows[0]["image"]).name == "é 猫.png"
    assert "\\u732b" in done.out


@pytest.mark.parametrize("how", ["full", "closed", "help full", "inspect full"])
def test_an_output_that_fails_is_one_line(how: str, results: dict[str, Result]) -> None:
    done = results[how]
    error, hint = done.err.splitlines()
    assert (done.code, done.out) == (2, "")
    assert error.startswith("error[output.unwritable]: ")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("how", ["nobody", "help nobody"])
def test_a_closed_pipe_ends_it_without_a_word(how: str, results: dict[str, Result]) -> None:
    assert results[how] == Result(1, "", "")


def test_messages_that_nobody_can_read_stop_nothing(results: dict[str, Result]) -> None:
    done = results["no stderr"]
    assert (done.code, len(done.out.splitlines())) == (2, 1)
    assert results["stderr closed"] == results["caption"]


def test_a_closed_stdin_is_one_line(results: dict[str, Result]) -> None:
    done = results["chat without stdin"]
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error[prompt.unreadable]: ")


def test_a_terminal_gets_no_control_characters(results: dict[str, Result]) -> None:
    shown = results["inspect on a terminal"]
    assert shown.code == 0
    assert SEEN in shown.out
    assert not set("\x1b\x07\x9b\u202e\x7f") & set(shown.out)
    assert NAME in results["inspect in a pipe"].out  # a pipe gets the text itself
    for how in ("error on a terminal", "usage on a terminal"):
        assert results[how].code == 2
        assert "]0;x" in results[how].err
        assert not {"\x1b", "\x9b"} & set(results[how].err)


def test_what_is_split_between_pieces_is_replaced_too() -> None:
    """Each character by itself: no two pieces make a sequence."""
    end, child = os.openpty()
    with Output(os.fdopen(child, "wb"), "utf-8", safe=True, line_buffering=False) as stream:
        for piece in ("a\x1b", "]52;c;", "x\x07\tb", "\x9b", "2J\n"):
            assert stream.write(piece) == len(piece)
        stream.flush()
        shown = os.read(end, 1000).decode()
    assert shown.split() == ["a\ufffd]52;c;x\ufffd", "b\ufffd2J"]
    os.close(end)


def test_styles_of_our_own_reach_a_terminal() -> None:
    screen = io.StringIO()
    console = SafeConsole(file=screen, force_terminal=True, color_system="standard", width=80)
    console.print(Text("bad \x1b]0;x"), style="red")
    assert screen.getvalue().count("\x1b") == 2  # red on, red off
    assert "bad \ufffd]0;x" in screen.getvalue()


def test_languages_keep_their_marks() -> None:
    text = "می\u200cخواهم \u200fא क्\u200dष\tZeile\n👩\u200d👧"  # noqa: RUF001
    assert visible(text) == text


def test_json_on_a_terminal_is_exact_and_shows_no_controls() -> None:
    line = to_json({"caption": ESCAPES, "path": "\udcff"})
    assert json.loads(line) == {"caption": ESCAPES, "path": "\udcff"}
    assert line.isprintable()
