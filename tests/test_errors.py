"""Codes of errors: stable names, printed by the command line."""

from __future__ import annotations

import pickle

import pytest

from tests.error_codes import CODE, raised
from vlmport.cli.console import report, warnings_of_ours
from vlmport.errors import ImageError, OptionWarning, VlmportError, VlmportWarning


def test_codes_are_a_noun_and_what_is_wrong() -> None:
    assert [code for code in raised() if not CODE.fullmatch(code)] == []


def test_a_code_is_printed_with_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    report(ImageError("a.png: unreadable", hint="check it", code="image.unreadable"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error[image.unreadable]: a.png: unreadable", "hint: check it"]


def test_a_code_is_printed_with_the_warning(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    with warnings_of_ours():
        warnings.simplefilter("always")
        warnings.warn(OptionWarning("left out", code="option.default-left-out"), stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["warning[option.default-left-out]: left out"]


@pytest.mark.parametrize("kind", [VlmportError, VlmportWarning])
def test_no_error_or_warning_without_a_code(kind: type[VlmportError | VlmportWarning]) -> None:
    with pytest.raises(TypeError, match="code"):
        kind("without a code")  # type: ignore[call-arg]


def test_an_error_keeps_its_code_and_hint_in_another_process() -> None:
    error = ImageError("a.png: unreadable", hint="check it", code="image.unreadable")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ImageError
    assert again.to_json() == error.to_json()
    warning = OptionWarning("left out", code="option.default-left-out")
    assert pickle.loads(pickle.dumps(warning)).code == warning.code
