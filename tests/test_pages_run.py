"""The pages that show output are run, and must print what they show.

Of each page the `console` blocks run in order in one folder, and so do the `python` blocks that a
`text` block follows, which holds what they print. `sh` blocks are for the reader alone. A line `…`
stands for any lines; within a line it stands for any text. Numbers with a point may differ.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
PAGES = [
    "quickstart.md",
    "tutorial.md",
    "how-to/chat-with-images.md",
    "how-to/work-offline.md",
]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+(?:\.\d+)*(?:e[+-]?\d+)?|\d+e[+-]?\d+")


@dataclass(frozen=True)
class Step:
    """A command for a shell, or a program for Python, and what it prints."""

    command: str
    is_python: bool
    output: str


def steps(page: str) -> Iterator[Step]:
    """The steps of a page, in order."""
    blocks = [(kind, text) for _, kind, text in BLOCK.findall(page)]
    for (kind, text), (next_kind, next_text) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                yield Step(command, False, output)
        elif kind == "python" and next_kind == "text":
            yield Step(text, True, next_text)


def matches(shown: str, printed: str) -> bool:
    """Whether a text is printed as shown, but for spaces and for numbers with a point."""
    pattern = ""
    for line in shown.splitlines():
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            plain = " ".join(NUMBER.sub("N", line).split())
            pattern += re.escape(plain).replace("…", ".*") + r"\n"
    lines = (" ".join(NUMBER.sub("N", line).split()) for line in printed.splitlines())
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for path in [*EXAMPLES.glob("*.png"), *EXAMPLES.glob("*.json")]:
        shutil.copy(path, folder)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "COLUMNS": "110",
        "VLMPORT_CACHE": str(tmp_path / "cache"),
    }
    program = ""
    seen = ""
    ran = list(steps((DOCS / name).read_text("utf-8")))
    assert ran
    for step in ran:
        if step.is_python:  # the programs of a page go on from one another
            program += step.command
            command = [sys.executable, "-c", program]
        else:
            command = ["bash", "-c", step.command]
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        printed = done.stdout
        if step.is_python:
            assert done.returncode == 0, printed
            assert printed.startswith(seen)
            printed, seen = printed.removeprefix(seen), printed
        assert matches(step.output, printed), f"{step.command}\n{printed}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.5\n", "a 2.25\n", True),
        ("a 1\n", "a 2\n", False),
        ("a\n…\nb\n", "a\nx\ny\nb\n", True),
        ("a\n…\nb\n", "a\nx\ny\n", False),
        ("in …, there\n", "in /tmp/x, there\n", True),
        ("", "", True),
        ("", "a\n", False),
        ("│ a  │ b │\n", "│ a │   b │\n", True),
    ],
)
def test_matching_can_fail(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) == same


def test_the_steps_of_a_page_are_found() -> None:
    page = "```console\n$ a\nb\n$ c\n```\n```sh\nd\n```\n```python\ne\n```\n\n```text\nf\n```\n"
    expected = [Step("a", False, "b\n"), Step("c", False, ""), Step("e\n", True, "f\n")]
    assert list(steps(page)) == expected
