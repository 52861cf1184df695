"""The examples run, on the built-in models, and print what they promise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CAPTIONS = json.loads((EXAMPLES / "captions.json").read_text("utf-8"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT
    )


def test_every_example_is_named_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    files = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.mjs"), *EXAMPLES.glob("*.ipynb")]
    files += EXAMPLES.glob("*/*.html")
    assert len(files) >= 8
    names = [path.relative_to(EXAMPLES).as_posix() for path in files]
    assert [name for name in names if f"({name})" not in readme] == []


def test_caption_folder_captions_each_image_and_reports_a_damaged_one(tmp_path: Path) -> None:
    for name in CAPTIONS:
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "a.png").write_bytes((EXAMPLES / "red_square.png").read_bytes()[:60])
    done = run(EXAMPLES / "caption_folder.py", tmp_path, "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert "a.png" in lines[0]["error"]
    assert {line["image"]: line["caption"] for line in lines[1:]} == CAPTIONS
    assert "8 captioned, 1 failed" in done.stderr


def test_ask_and_chat_answers_right_and_reuses_the_cache() -> None:
    done = run(EXAMPLES / "ask_and_chat.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "one question: red",
        "first: two",
        "then: a purple circle (110 of 125 prompt tokens were cached)",
        "fixed choices: yellow",
    ]


def test_export_and_verify_ends_with_a_caption(tmp_path: Path) -> None:
    image = EXAMPLES / "red_square.png"
    command = [EXAMPLES / "export_and_verify.py", ROOT / "src/vlmport/builtin/shapes"]
    done = run(*command, tmp_path / "out", image)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["verified", CAPTIONS["red_square.png"]]


def test_export_and_verify_prints_an_error_and_its_hint(tmp_path: Path) -> None:
    done = run(EXAMPLES / "export_and_verify.py", tmp_path, tmp_path / "out", "photo.jpg")
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_prints_what_it_holds(name: str) -> None:
    done = run("-m", "tests.notebook", EXAMPLES / name)
    assert done.returncode == 0, done.stderr


def test_a_notebook_that_holds_another_text_is_found(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": "print(1)", "metadata": {}, "execution_count": 1}
    cell |= {"id": "one", "outputs": [{"output_type": "stream", "name": "stdout", "text": "2\n"}]}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path = tmp_path / "other.ipynb"
    path.write_text(json.dumps(notebook), "utf-8")
    done = run("-m", "tests.notebook", path)
    assert done.returncode == 1
    assert "code cell 1 prints\n1" in done.stderr
