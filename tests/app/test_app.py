"""`vlmport app`: the page in Chromium, and what answers it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from tests.app.test_answering import PICTURE, QUESTION, asking
from tests.errors import raises
from tests.overlays import overlay
from tests.serve.running import running
from tests.test_privacy import command_of, empty_home, files_below
from tests.web.test_web import CHROMIUM, node
from vlmport import cli
from vlmport.app.answering import LocalAnswering, RemoteAnswering
from vlmport.app.page import build, draw_examples
from vlmport.app.server import open_server
from vlmport.bundle import Bundle
from vlmport.errors import DependencyError, OptionError, PromptError, ServerError
from vlmport.runtime.model import VLM

__all__ = ["node"]  # a fixture: it installs what web/ needs, Playwright too

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements-app.txt"


@pytest.fixture(scope="session")
def gradio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overlay("app", tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="module")
def model(built_in: Callable[[str], Bundle]) -> Iterator[VLM]:
    with VLM.open(built_in("shapes-smolvlm"), precision="q4") as model:
        yield model


def test_a_model_here_answers_as_it_does_alone(model: VLM) -> None:
    here = LocalAnswering("shapes-smolvlm", model)
    try:
        assert here.takes_questions
        assert here.facts()[:2] == ("precision q4", "device cpu")
        alone = model.generate(asking(QUESTION), [PICTURE], max_new_tokens=20)
        pieces = list(here.answer(asking(QUESTION), [str(PICTURE)], max_new_tokens=20))
        assert "".join(pieces) == alone.text
        caption = model.caption(PICTURE, max_new_tokens=5)
        assert "".join(here.caption(str(PICTURE), max_new_tokens=5)) == caption.text
        with raises(PromptError, "prompt.image-count"):
            list(here.answer(asking(QUESTION), []))
    finally:
        here.close()


def test_a_visitor_who_goes_frees_the_row(model: VLM) -> None:
    here = LocalAnswering("shapes-smolvlm", model)
    try:
        pieces = here.answer(
            asking(QUESTION), [str(PICTURE)], min_new_tokens=200, max_new_tokens=200
        )
        next(iter(pieces))
        pieces.close()  # type: ignore[attr-defined]
        ended = here._scheduler.stats
        while not ended().ended.get("cancelled"):
            pass
        assert ended().running_rows == 0
    finally:
        here.close()


def test_a_captioner_takes_no_questions(built_in: Callable[[str], Bundle]) -> None:
    with VLM.open(built_in("shapes"), precision="q4") as model:
        here = LocalAnswering("shapes", model)
        assert not here.takes_questions
        here.close()


def test_vlmport_serve_answers_as_the_model_here(model: VLM) -> None:
    with running({"shapes-smolvlm": "shapes-smolvlm"}, precision="q4") as server:
        there = RemoteAnswering(server.url)
        assert there.facts() == (f"served by {server.url}",)  # not opened yet
        alone = model.generate(asking(QUESTION), [PICTURE], max_new_tokens=20)
        pieces = list(there.answer(asking(QUESTION), [str(PICTURE)], max_new_tokens=20))
        assert "".join(pieces) == alone.text
        assert there.facts()[:2] == ("precision q4", "device cpu")
        caption = model.caption(PICTURE, max_new_tokens=5).text.strip()
        assert list(there.caption(str(PICTURE), max_new_tokens=5)) == [caption]
        with raises(ServerError, "server.refused", 400):
            list(there.answer(asking(QUESTION), [str(REQUIREMENTS)]))
        there.close()


def test_the_key_file_is_read_as_the_server_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | None] = []

    def remote(url: str, model: str | None, key: str | None) -> None:
        given.append(key)
        raise ServerError("stop here", hint="", code="server.unreachable")

    monkeypatch.setattr("vlmport.app.answering.RemoteAnswering", remote)
    path = tmp_path / "keys"
    command = ["app", "--server", "http://127.0.0.1:1", "--api-key-file", str(path)]
    path.write_text("# of the page\n\n first-key-of-two \nsecond-key\n")
    assert "error[server.unreachable]" in CliRunner().invoke(cli.app, command).stderr
    assert given == ["first-key-of-two"]
    path.write_text("# none yet\n")
    assert "error[server.bad-key-file]" in CliRunner().invoke(cli.app, command).stderr
    assert len(given) == 1


def test_without_gradio_it_says_what_to_install(tmp_path: Path, model: VLM) -> None:
    here = LocalAnswering("shapes-smolvlm", model)
    with raises(DependencyError, "dependency.missing", "gradio"):
        build(here, draw_examples(tmp_path))
    with raises(DependencyError, "dependency.missing", "gradio"), open_server(here, 0):
        pass
    here.close()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_page_answers_in_chromium_and_calls_nobody(
    tmp_path: Path, gradio: Path, node: str, built_in: Callable[[str], Bundle], model: VLM
) -> None:
    """No address of another machine is reached: the system ends the process that tries."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.fail("no Chromium") if os.environ.get("CI") else pytest.skip("no Chromium")
    home = tmp_path / "home"
    home.mkdir()
    folder = built_in("shapes-smolvlm").folder
    command = ("-m", "vlmport", "app", folder, "--precision", "q4", "--port", "0")
    environment = empty_home(home) | {"PYTHONPATH": str(gradio), "TMPDIR": str(home)}
    said = tmp_path / "stderr"
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            command_of("loopback", *command),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        try:
            address = process.stdout.readline().strip()
            assert urlsplit(address).hostname == "127.0.0.1", said.read_text()
            with raises(OptionError, "demo.port-unavailable", urlsplit(address).port):
                refuse_the_same_port(urlsplit(address).port)
            seen = visit(address, chromium, tmp_path)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            watchdog.cancel()
    assert process.returncode == 0, said.read_text()
    assert said.read_text() == ""
    assert files_below(home) == []  # no upload is left

    assert (seen["foreign"], seen["problems"], seen["shares"]) == ([], [], 0)
    for fact in (folder.name, "precision q4", "device cpu"):
        assert fact in seen["facts"]
    examples = draw_examples(tmp_path)
    pictures = [examples[0].image, PICTURE]
    assert seen["captions"] == [model.caption(one).text.strip() for one in pictures]
    talk = model.conversation()
    first = talk.ask(examples[4].question, [examples[4].image])
    assert seen["answers"] == [first.text.strip(), talk.ask(QUESTION).text.strip()]


def refuse_the_same_port(port: int | None) -> None:
    from vlmport.app.server import _bound

    assert port is not None
    _bound(port).close()


def visit(address: str, chromium: str, folder: Path) -> dict[str, Any]:
    """What a visitor saw (visit.mjs)."""
    executable = shutil.which("node")
    assert executable is not None
    command = [executable, ROOT / "tests/app/visit.mjs", address, chromium, PICTURE]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
