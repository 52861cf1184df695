"""A JSON object from a file of somebody else's, or what is wrong with it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from vlmport.errors import ConfigError, VlmportError, WeightError
from vlmport.files.json_files import load_json


def write(folder: Path, data: bytes) -> Path:
    path = folder / "config.json"
    path.write_bytes(data)
    return path


def test_load_json_reads_an_object(tmp_path: Path) -> None:
    assert load_json(write(tmp_path, '{"a": "é"}'.encode())) == {"a": "é"}
    assert load_json(write(tmp_path, b'{"a": "\\ud83d\\ude00"}')) == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not JSON at line 1 column 1"),
        (b'{"a": 1,\n "b": }', "not JSON at line 2 column 7"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": "\\uD83D"}', "surrogates not allowed"),
        (b'{"\\ude00": 1}', "surrogates not allowed"),
        (b'{"a": "\xed\xa0\xbd"}', "not JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"null", "expected a JSON object, got null"),
        (b"3", "expected a JSON object, got a number"),
    ],
)
def test_load_json_says_what_is_wrong(tmp_path: Path, data: bytes, expected: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert caught.value.hint
    assert caught.value.code == "source.not-json"


def test_load_json_missing_or_a_folder(tmp_path: Path) -> None:
    with raises(ConfigError, "source.missing-file"):
        load_json(tmp_path / "config.json")
    with pytest.raises(ConfigError) as caught:
        load_json(tmp_path)
    assert caught.value.code == "source.not-a-file"
    with raises(WeightError, "source.missing-file"):
        load_json(tmp_path / "x.json", error=WeightError)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_give_an_object_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), data)
    with contextlib.suppress(VlmportError):
        assert isinstance(load_json(path), dict)
