"""Codes of errors: stable names, printed by the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmport.cli.console import report, warnings_of_ours
from vlmport.errors import ImageError, OptionWarning, VlmportError

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"[a-z]+\.[a-z0-9]+(-[a-z0-9]+)*")


def python_codes() -> Iterator[tuple[str, str]]:
    """(file, code) for each `code="…"` that a call in the package is given."""
    for path in sorted((ROOT / "src/vlmport").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "code" and isinstance(value, ast.Constant) and value.value:
                    yield path.name, value.value


def test_codes_are_a_noun_and_what_is_wrong() -> None:
    wrong = [found for found in python_codes() if not CODE.fullmatch(found[1])]
    assert not wrong


def test_a_code_is_printed_with_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    report(ImageError("a.png: unreadable", hint="check it", code="image.unreadable"))
    report(VlmportError("without a code"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error[image.unreadable]: ")
    assert lines[2].startswith("error: ")


def test_a_code_is_printed_with_the_warning(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    with warnings_of_ours():
        warnings.simplefilter("always")
        warnings.warn(OptionWarning("left out", code="option.unsupported"), stacklevel=1)
        warnings.warn("left out too", OptionWarning, stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning[option.unsupported]", "warning"]
