"""A tokenizer that would take all time or memory, or end the process, is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vlmport
from tests.fuzz.bounds import bounded
from vlmport.errors import PromptError, TokenizerError
from vlmport.text import tokenizer as module
from vlmport.text.killable import MESSAGE, Worker
from vlmport.text.tokenizer import Encoder, read_tokenizer

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
A = {"String": "a"}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner


def sequence(name: str, parts: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: parts}


def strip(start: int, stop: int = 0) -> dict[str, Any]:
    return {"type": "Strip", "content": "a", "start": start, "stop": stop}


# What is wrong, and the code of the error that reading it gives.
REFUSED = {
    "doubling 30 times": {
        "normalizer": sequence("normalizers", [replace(A, "aa")] * 30),
    },
    "doubling while decoding": {
        "decoder": sequence("decoders", [replace(A, "aa")] * 30),
    },
    "a million for each": {"normalizer": replace({"Regex": "a"}, "a" * 1_000_000)},
    "for each place": {"normalizer": replace({"String": ""}, "a" * 1000)},
    "a long head": {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}},
    "chunks of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "more than there is": {"decoder": strip(999_999_999_999)},
    "the end of a token that has none": {"decoder": strip(0, 1)},
    "an unknown pattern while decoding": {"decoder": replace({"Regex": "(a+)+$"}, "")},
    "a long pattern": {"pre_tokenizer": split("a?" * 2000)},
    "deep": {"normalizer": nested(20, {"type": "NFC"})},
    "many": {"normalizer": sequence("normalizers", [{"type": "NFC"}] * 100)},
}
UNREADABLE = {
    "a character map of nothing": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "a character map that lies": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAA"}
    },
    "a prefix longer than a word": {"model": BPE | {"continuing_subword_prefix": "###"}},
    "a pattern that is none": {"pre_tokenizer": split("(")},
    "no such part": {"normalizer": {"type": "Nothing"}},
    "no model": {"model": None},
    "a size below zero": {"pre_tokenizer": {"type": "FixedLength", "length": -1}},
}
SLOW = {
    "nested": ({"pre_tokenizer": split("(a+)+$")}, "a" * 40 + "b"),
    "alternatives": ({"pre_tokenizer": split("(?:a|aa){1,18}[cd]")}, "a" * 5000),
    "normalizing": ({"normalizer": replace({"Regex": "(?:a|aa){1,18}[cd]"}, "")}, "a" * 5000),
    "growing a long text": (
        {"normalizer": sequence("normalizers", [replace(A, "aa")] * 6)},
        "a" * 10_000_000,
    ),
    "a character map out of bounds": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////9h"}},
        "aab",
    ),
}
WITHOUT_UNKNOWN = {
    "words": WORDS,
    "pieces": {
        "type": "WordPiece",
        "vocab": {"a": 0},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "unigrams": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module")
def impatient() -> Iterator[Worker]:
    worker = Worker("tokenizer", seconds=0.3, memory=512 << 20)
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def _impatient(impatient: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKER", impatient)


def write(folder: Path, changes: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": BPE, "added_tokens": []} | changes))
    return folder


def is_one_line(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) < 2 * MESSAGE


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_end_the_process_is_refused(name: str, folder: Path) -> None:
    with bounded(20, 1 << 30), pytest.raises(TokenizerError) as caught:
        read_tokenizer(write(folder, REFUSED[name]))
    assert caught.value.code == "tokenizer.refused"
    assert is_one_line(caught.value)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_can_not_be_read(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(write(folder, UNREADABLE[name]))
    assert caught.value.code in ("tokenizer.unreadable", "tokenizer.stopped")
    assert is_one_line(caught.value)
    assert capfd.readouterr().err == "", "a panic's report"


@pytest.mark.parametrize("name", SLOW)
def test_what_takes_for_ever_is_stopped(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, text = SLOW[name]
    encoder = Encoder(read_tokenizer(write(folder, changes)))
    with bounded(20, 2 << 30), pytest.raises(PromptError) as caught:
        encoder.encode(text)
    assert str(caught.value.code).startswith("tokenizer.")
    assert is_one_line(caught.value)
    assert capfd.readouterr().err == "", "a panic's report"


@pytest.mark.parametrize("name", WITHOUT_UNKNOWN)
def test_a_character_without_a_token(name: str, folder: Path) -> None:
    encoder = Encoder(read_tokenizer(write(folder, {"model": WITHOUT_UNKNOWN[name]})))
    assert encoder.encode("a") == [0]
    with pytest.raises(PromptError) as caught:
        encoder.encode("é")
    assert caught.value.code == "tokenizer.can-not-encode"
    assert caught.value.hint
    assert is_one_line(caught.value)


def test_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(write(folder, {}))
    assert caught.value.code == "tokenizer.refused"


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": split("a(?=b)|.")},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"normalizer": replace({"String": " "}, "▁")},
        {"model": BPE | {"continuing_subword_prefix": "b", "merges": []}},
    ],
)
def test_an_unusual_tokenizer_gives_its_ids(changes: dict[str, Any], folder: Path) -> None:
    tokenizer = read_tokenizer(write(folder, changes))
    for text in ("", "aabba", "b a"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert Encoder(tokenizer).encode(text) == ids


def test_built_in_tokenizers_run_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ask", lambda *given: pytest.fail("another process"))
    for path in (Path(vlmport.__file__).parent / "builtin").glob("*/tokenizer.json"):
        assert Encoder(read_tokenizer(path.parent)).encode("a red square")
