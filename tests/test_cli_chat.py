"""`vlmport ask` and `vlmport chat`: answers on stdout, all else on stderr, nothing lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.processes import started
from vlmport import cli
from vlmport.cli.chat import Talk
from vlmport.errors import OutputError
from vlmport.exporter import export
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Idefics3, which knows pictures, questions and turns."""
    folder = tmp_path_factory.mktemp("idefics3")
    checkpoint = write_idefics3_checkpoint(
        folder / "checkpoint", text={"max_position_embeddings": 900}
    )
    export(checkpoint, folder / "bundle", precisions="fp32")
    return folder / "bundle"


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> VLM:
    return VLM.open(bundle, threads=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = []
    for i, (height, width) in enumerate([(40, 60), (20, 20)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path_factory.mktemp("pictures") / f"picture {i}.png"
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
    return paths


def run(*arguments: object, **options: Any) -> Result:
    given = [str(one) for one in arguments]
    return CliRunner().invoke(cli.app, given, catch_exceptions=False, **options)


def few(bundle: Path) -> list[object]:
    return ["-m", bundle, "--max-new-tokens", 6, "--threads", 1]


def answer(vlm: VLM, question: str | None, images: list[str], **options: Any) -> str:
    chat = vlm.conversation(image_options=options.pop("image_options", None))
    return chat.ask(question, images, max_new_tokens=6, **options).text.strip()


# ask


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_question_about_any_number_of_pictures(
    bundle: Path, vlm: VLM, pictures: list[str], count: int
) -> None:
    done = run("ask", *pictures[:count], "What is it?", *few(bundle))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == answer(vlm, "What is it?", pictures[:count]) + "\n"


def test_a_picture_alone_is_captioned(bundle: Path, vlm: VLM, pictures: list[str]) -> None:
    done = run("ask", pictures[0], *few(bundle))
    assert done.stdout == answer(vlm, None, pictures[:1]) + "\n"
    captioned = run("caption", pictures[0], *few(bundle))
    assert captioned.stdout.strip() == done.stdout.strip()


def test_what_is_streamed_is_what_is_printed(bundle: Path, pictures: list[str]) -> None:
    asked = ["ask", pictures[0], "What is it?", *few(bundle)]
    assert run(*asked, "--stream").stdout == run(*asked).stdout


def test_json_says_all_that_is_known(bundle: Path, vlm: VLM, pictures: list[str]) -> None:
    row = json.loads(run("ask", *pictures, "Which?", *few(bundle), "--json").stdout)
    assert (row["images"], row["question"]) == (pictures, "Which?")
    want = vlm.conversation().ask("Which?", pictures, max_new_tokens=6)
    assert (row["answer"], tuple(row["token_ids"])) == (want.text, want.token_ids)
    assert row["counts"] == want.counts
    assert "score" not in row


@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "missing"])
def test_an_error_has_a_row_of_json(bundle: Path, tmp_path: Path, damaged: bool) -> None:
    path = tmp_path / "a.png"
    if damaged:
        path.write_text("no image")
    done = run("ask", path, "Which?", *few(bundle), "--json")
    assert done.exit_code == 2
    row = json.loads(done.stdout)
    assert (row["images"], row["question"]) == ([str(path)], "Which?")
    assert row["error"].keys() == {"code", "message", "hint"}
    assert row["error"]["code"] == ("image.not-a-picture" if damaged else "image.not-found")
    assert done.stderr.startswith(f"error[{row['error']['code']}]: ")


def test_decoding_options_and_a_system_message(bundle: Path, pictures: list[str]) -> None:
    options = ["--num-beams", 3, "--num-return-sequences", 2]
    done = run("ask", pictures[0], "What?", *few(bundle), *options, "--system", "Be brief.")
    with VLM.open(bundle, threads=1) as vlm:
        chat = vlm.conversation("Be brief.")
        want = chat.ask(
            "What?", pictures[:1], max_new_tokens=6, num_beams=3, num_return_sequences=2
        )
    assert done.stdout == "".join(f"{one.text.strip()}\n" for one in (want, *want.alternatives))


@pytest.mark.parametrize("name", ["do_image_splitting", "do-image-splitting"])
@pytest.mark.parametrize("command", ["ask", "caption", "chat"])
def test_pictures_that_are_not_cut(
    bundle: Path, vlm: VLM, pictures: list[str], command: str, name: str
) -> None:
    whole = {"do_image_splitting": False}
    options = [*few(bundle), "--image-option", f"{name}=false"]
    if command == "chat":
        done = run("chat", "--image", pictures[0], *options, input="What?\n")
        want = answer(vlm, "What?", pictures[:1], image_options=whole)
    else:
        done = run(command, pictures[0], *["What?"] * (command == "ask"), *options)
        question = "What?" if command == "ask" else None
        want = answer(vlm, question, pictures[:1], image_options=whole)
    assert done.stdout.strip() == want
    assert want != answer(vlm, "What?" if command != "caption" else None, pictures[:1])


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["absent.png", "What?"], "absent.png: no such file", "all arguments but the last"),
        (["what", "is", "this"], "what: no such file", "put the question in quotes"),
        (["photo.jpg"], "photo.jpg: no such file", "a question comes last"),
        (["{0}", "{1}"], "no question: the last argument", "put the question last"),
        (["{0}", "."], "the last argument '.' is a folder", "put the question last"),
        (["{0}", " "], "the question is empty", "vlmport ask"),
        (["{0}", "What?", "--stream", "--json"], "contradict each other", "leave one"),
        (["{0}", "What?", "--image-option", "do_image_splitting=no"], "not JSON", "in JSON"),
        (
            ["{0}", "What?", "--image-option", "split=false"],
            "no image option 'split'",
            "do_image_splitting",
        ),
        (["{0}", "What?", "--top-p", "2"], "--top-p 2.0", "hint"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_what_is_wrong_with_a_question_is_one_line(
    bundle: Path, pictures: list[str], arguments: list[str], said: str, hint: str
) -> None:
    given = [one.format(*pictures) for one in arguments]
    done = run("ask", *given, "-m", bundle)
    assert (done.exit_code, done.stdout) == (2, "")
    error, *rest = done.stderr.splitlines()
    assert said in error
    assert hint in "".join(rest)
    assert "Traceback" not in done.stderr


def test_a_captioner_says_that_it_takes_no_text(tiny_bundle: Path, pictures: list[str]) -> None:
    done = run("ask", pictures[0], "What?", "-m", tiny_bundle)
    assert done.exit_code == 2
    assert "this captioner takes pictures and no text" in done.stderr
    assert run("ask", pictures[0], "-m", tiny_bundle).stdout.strip()


# chat


def test_turns_from_a_pipe(bundle: Path, vlm: VLM, pictures: list[str]) -> None:
    """No prompt; the second question goes on from the first."""
    lines = f"What is it?\n\nAnd where?\n/image {pictures[1]}\nWhich?\n"
    done = run("chat", "--image", pictures[0], *few(bundle), input=lines)
    chat = vlm.conversation()
    options = {"max_new_tokens": 6}
    want = [
        chat.ask("What is it?", [pictures[0]], **options),
        chat.ask("And where?", **options),
        chat.ask("Which?", [pictures[1]], **options),
    ]
    assert done.stdout == "".join(f"{one.text.strip()}\n" for one in want)
    assert done.stderr == "1 image attached to the next question\n"
    assert done.exit_code == 0
    assert len({one.text for one in want}) == 3


def test_a_reset_forgets(bundle: Path) -> None:
    done = run("chat", *few(bundle), "--system", "Be brief.", input="What?\nWhy?\n/reset\nWhat?\n")
    first, second, third = done.stdout.splitlines()
    assert first == third != second
    assert "the conversation is forgotten" in done.stderr


def test_help_and_quit(bundle: Path) -> None:
    done = run("chat", *few(bundle), input="/help\n/quit\nWhat?\n")
    assert (done.exit_code, done.stdout) == (0, "")
    for command in ("/image", "/reset", "/help", "/quit"):
        assert command in done.stderr


def test_what_is_wrong_is_a_line_and_loses_nothing(
    bundle: Path, vlm: VLM, pictures: list[str], tmp_path: Path
) -> None:
    """A pipe goes on too, and its exit code tells."""
    (tmp_path / "text.png").write_text("not a picture")
    lines = [
        f"/image '{pictures[0]}'",
        "What is it?",
        "/image absent.png",
        f"/image {tmp_path / 'text.png'}",
        "/imgae x",
        "an <image> in words",
        "too long: " + "x" * 900,
        "And where?",
    ]
    done = run("chat", *few(bundle), input="\n".join(lines) + "\n")
    chat = vlm.conversation()
    want = [
        chat.ask("What is it?", [pictures[0]], max_new_tokens=6),
        chat.ask("an <image> in words", max_new_tokens=6),
        chat.ask("And where?", max_new_tokens=6),
    ]
    assert done.stdout == "".join(f"{one.text.strip()}\n" for one in want)
    assert done.exit_code == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 4
    for one, words in zip(
        said,
        ["absent.png: no such file", "not an image but text", "/imgae (did you mean '/image'?)",
         "the model's context is 900"],
        strict=True,
    ):  # fmt: skip
        assert words in one
    assert "Traceback" not in done.stderr


def test_a_full_conversation_says_what_helps(bundle: Path, pictures: list[str]) -> None:
    """The oldest questions are forgotten where that is asked for."""
    lines = [f"/image {pictures[0]}", *["what " + "x" * 300] * 5, ""]
    done = run("chat", *few(bundle), input="\n".join(lines))
    assert done.exit_code == 2
    assert "error[conversation.full]" in done.stderr
    assert "/reset" in done.stderr
    assert "--drop-oldest" in done.stderr
    dropping = run("chat", "--drop-oldest", *few(bundle), input="\n".join(lines))
    assert dropping.exit_code == 0, dropping.stderr
    assert "forgotten" in dropping.stderr


def test_a_picture_waits_until_a_question_is_answered(
    bundle: Path, vlm: VLM, pictures: list[str]
) -> None:
    lines = [f"/image {pictures[0]}", "x" * 950, "What?", f"/image {pictures[1]}", "/image", "Why?"]
    done = run("chat", *few(bundle), input="\n".join(lines) + "\n")
    chat = vlm.conversation()
    want = [chat.ask("What?", [pictures[0]], max_new_tokens=6), chat.ask("Why?", max_new_tokens=6)]
    assert done.stdout == "".join(f"{one.text.strip()}\n" for one in want)
    assert "0 images attached to the next question" in done.stderr


def test_beams_are_printed_whole(bundle: Path, vlm: VLM) -> None:
    done = run("chat", *few(bundle), "--num-beams", 3, input="What?\n")
    want = vlm.conversation().ask("What?", max_new_tokens=6, num_beams=3).text.strip()
    assert done.stdout == want + "\n"


def test_addresses_keep_their_slashes(bundle: Path, vlm: VLM, pictures: list[str]) -> None:
    """Also those that nothing fetches, which are named in full."""
    address = Path(pictures[0]).as_uri()
    want = answer(vlm, "What is it?", [pictures[0]])
    assert run("ask", address, "What is it?", *few(bundle)).stdout == f"{want}\n"
    chat = run("chat", "--image", address, *few(bundle), input="What is it?\n")
    assert chat.stdout == f"{want}\n"
    for command in (["caption"], ["ask"], ["chat", "--image"]):
        done = run(*command, "https://example.org/a.png", *few(bundle), input="")
        assert done.exit_code == 2
        assert "error[image.url]: https://example.org/a.png" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "absent.png"], "absent.png: no such file"),
        (["--top-p", "2"], "--top-p 2.0"),
        (["--image-option", "split=1"], "no image option 'split'"),
    ],
    ids=str,
)
def test_what_is_wrong_from_the_start(bundle: Path, arguments: list[str], said: str) -> None:
    done = run("chat", "-m", bundle, *arguments, input="What?\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_bytes_that_are_no_text(bundle: Path) -> None:
    done = run("chat", *few(bundle), input=b"What?\n\xff\xfe\n")
    assert done.exit_code == 2
    assert "the input is not UTF-8" in done.stderr or "not Unicode" in done.stderr
    assert "Traceback" not in done.stderr


def test_on_a_terminal_an_error_is_said_and_forgotten(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/nothing", "What?", KeyboardInterrupt(), "", EOFError()])

    def typed(interactive: bool) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("vlmport.cli.chat._read_line", typed)
    talk = Talk(vlm.conversation(), {"max_new_tokens": 6})
    assert talk.run(interactive=True) is None
    shown = capsys.readouterr()
    assert shown.out == answer(vlm, "What?", []) + "\n"
    assert "unknown command /nothing" in shown.err
    assert "Ctrl-D or /quit ends" in shown.err


def test_ctrl_c_ends_a_pipe(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to ask the next question."""
    talk = Talk(vlm.conversation(), {"max_new_tokens": 6})
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nWhy?\n"))

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(talk.conversation, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.run(interactive=False)


def test_an_output_that_fails_ends_it(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would read the answer to the next question either."""
    talk = Talk(vlm.conversation(), {"max_new_tokens": 2})
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nWhy?\n"))
    asked: list[str] = []
    monkeypatch.setattr(talk, "answer", lambda line: asked.append(line) or fail())

    def fail() -> None:
        raise OutputError("full", code="output.unwritable")

    with pytest.raises(OutputError):
        talk.run(interactive=False)
    assert asked == ["What?"]


class Terminal:
    """`vlmport chat` on a terminal of its own."""

    def __init__(self, *arguments: object):
        self.end, child = pty.openpty()
        command = [sys.executable, "-m", "vlmport", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, cwd=ROOT, start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(child)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 120) -> None:
        """Wait until this is shown."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.end], [], [], 1)[0]:
                self.shown += os.read(self.end, 4096).decode(errors="replace")
        self.shown = self.shown[found.end() :]

    def interrupt(self, until: str) -> None:
        """Ctrl-C; again where it fell between the prompt and the reading, and waits for a key."""
        for _ in range(20):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.until(until, seconds=4)
                return
        raise AssertionError(f"no {until!r} in {self.shown!r}")

    def type(self, line: str) -> None:
        os.write(self.end, line.encode())


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    """An answer that would take a while; then the program still listens."""
    checkpoint = write_idefics3_checkpoint(
        tmp_path / "checkpoint", text={"max_position_embeddings": 40000}
    )
    export(checkpoint, tmp_path / "bundle", precisions="fp32")
    length = ["--max-new-tokens", 30000, "--min-new-tokens", 30000]
    terminal = Terminal("-m", tmp_path / "bundle", "--threads", 1, *length)
    try:
        terminal.until("> ")
        terminal.interrupt(until="Ctrl-D or /quit ends")  # at the prompt the line is forgotten
        terminal.until("> ")
        terminal.type("What is it?\n")
        terminal.until(r"What is it\?\r?\n")
        terminal.until(r"[^\s\x1b]")  # the answer has begun
        terminal.interrupt(until="stopped; the conversation is as it was")
        terminal.until("> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_a_prompt_is_no_data(bundle: Path, vlm: VLM) -> None:
    """On a terminal whose answers go to a file, the prompt does not."""
    end, child = pty.openpty()
    command = [sys.executable, "-m", "vlmport", "chat", *few(bundle)]
    with started(command, stdin=child) as process:
        os.close(child)
        os.write(end, b"What?\n/quit\n")
        out, err = process.communicate(timeout=120)
    os.close(end)
    assert process.returncode == 0
    assert out == answer(vlm, "What?", []) + "\n"
    assert err.count("> ") == 2
