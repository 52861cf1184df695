"""Codes of errors: stable names, printed by the command line."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests import error_codes, errors_reference
from tests.error_codes import CODE, codes_of_web, raised, raised_in_web, used_in_web
from vlmport.cli.console import report, warnings_of_ours
from vlmport.error_codes import catalogue
from vlmport.errors import ImageError, OptionWarning, VlmportError, VlmportWarning


def test_codes_are_a_noun_and_what_is_wrong() -> None:
    assert [code for code in raised() if not CODE.fullmatch(code)] == []


def test_the_catalogue_has_every_code_with_the_classes_that_it_comes_with() -> None:
    found = raised()
    for code, kinds in raised_in_web().items():
        found.setdefault(code, set()).update(kinds)
    assert {code: set(one.classes) for code, one in catalogue().items()} == found


def test_the_catalogue_is_in_order_and_says_what_each_means_and_what_to_do() -> None:
    assert list(catalogue()) == sorted(catalogue())
    for code, one in catalogue().items():
        assert list(one.classes) == sorted(one.classes), code
        assert one.meaning.endswith("."), code
        assert one.remedy, code


def test_the_typescript_package_has_a_type_of_the_codes_that_it_uses() -> None:
    codes = codes_of_web()
    assert codes == sorted(set(codes))
    assert set(codes) <= catalogue().keys()
    assert {one for one in used_in_web() if one in catalogue()} <= set(codes)
    by_template = {"template.too-slow", "tokenizer.too-slow"}  # link.ts: `${doing}.too-slow`
    assert set(codes) - by_template <= used_in_web()


def test_the_scan_sees_a_code_that_the_catalogue_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        'LATE = "image.late"',
        "def f(kind, *, code):",
        "    raise ImageError('no', code=code)",
        "def g(old):",
        "    code = LATE if old else 'image.odd'",
        "    f(1, code=code)",
        "    raise PromptError('no', code='prompt.odd' if old else LATE)",
    )
    tree = ast.parse("\n".join(lines))
    known = {**error_codes.trees(), Path("module.py"): tree}
    monkeypatch.setattr(error_codes, "trees", lambda: known)
    found = raised()
    assert found["image.odd"] == {"ImageError"}
    assert found["image.late"] == {"ImageError", "PromptError"}
    assert found["prompt.odd"] == {"PromptError"}


def test_the_page_of_errors_is_up_to_date() -> None:
    assert errors_reference.PAGE.read_text("utf-8") == errors_reference.page()


def test_the_catalogue_is_not_read_with_the_errors() -> None:
    code = "import sys, vlmport.errors; print('vlmport.error_codes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
