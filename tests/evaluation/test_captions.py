"""Reference captions are read from the forms people keep; what is wrong is said with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.errors import raises
from vlmport.errors import EvaluationError, OptionError
from vlmport.evaluation.captions import find_captions, read_captions
from vlmport.evaluation.examples import SCENES, captioned_pictures, drawn_scenes

COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 9, "file_name": "b.png", "height": 4, "width": 4},
        {"id": 3, "file_name": "sub/a.png"},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "an a"},
        {"id": 2, "image_id": 9, "caption": "a b \n"},
        {"id": 3, "image_id": 3, "caption": "another a"},
    ],
}
BOTH = {"b.png": ("a b",), "sub/a.png": ("an a", "another a")}
FILES = {
    "captions.json": json.dumps({"b.png": "a b", "sub/a.png": ["an a", "another a"]}),
    "coco.json": json.dumps(COCO),
    "metadata.csv": 'file_name,text\nb.png,a b\nsub/a.png,an a\nsub/a.png,"another a"\n',
    "marked.csv": "\ufeffsplit,file_name,caption\r\nx,b.png,a b\r\nx,sub/a.png,an a\r\n"
    "x,sub/a.png,another a\r\n",
    "metadata.jsonl": '{"file_name": "b.png", "text": "a b"}\n\n'
    '{"file_name": "sub/a.png", "text": "an a"}\n{"file_name": "sub/a.png", "text": "another a"}',
    "lists.jsonl": '{"file_name": "b.png", "captions": ["a b"], "w": 3, "h": 4}\n'
    '{"file_name": "sub/a.png", "captions": ["an a", " ", "another a"], "w": 3, "h": 4}\n',
    "only.csv": "blip,file_name\na b,b.png\nan a,sub/a.png\nanother a,sub/a.png\n",
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_same(tmp_path: Path, name: str) -> None:
    assert read_captions(write(tmp_path / name, FILES[name])) == BOTH
    assert list(read_captions(tmp_path / name)) == list(BOTH)  # in the order of the file


def test_quoted_captions_keep_commas_and_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", 'file_name,text\na.png,"one, two\nand ""three"""\n')
    assert read_captions(file) == {"a.png": ('one, two\nand "three"',)}
    line = json.dumps({"file_name": "a.png", "text": "a\u2028b"}, ensure_ascii=False)
    assert read_captions(write(tmp_path / "x.jsonl", line)) == {"a.png": ("a\u2028b",)}


MALFORMED = "captions.malformed"
# The file, its text, the error's code, and the facts in its message.
BAD: dict[str, tuple[str, ...]] = {
    "not JSON": ("x.json", '{"a.png": ', "source.not-json", "x.json: not JSON"),
    "deep JSON": ("x.json", "[" * 100_000, "source.not-json", "x.json: not JSON"),
    "a list": ("x.json", "[]", "source.not-json", "expected a JSON object, got a list"),
    "null": ("x.json", "null", "source.not-json", "expected a JSON object, got null"),
    "nothing": ("x.json", "{}", "captions.missing", "x.json"),
    "a number": (
        "x.json",
        '{"a.png": 3}',
        MALFORMED,
        "a.png: a caption is text or a list of texts, not 3",
    ),
    "numbers": ("x.json", '{"a.png": ["x", 3]}', MALFORMED, "a caption is text or a list of texts"),
    "no caption": (
        "x.json",
        '{"a.png": [], "b.png": "b"}',
        "captions.missing",
        "1 of 2",
        "'a.png'",
    ),
    "a blank caption": ("x.csv", "file_name,text\na.png, \n", "captions.missing", "1 of 1"),
    "no name": ("x.json", '{"": "x"}', MALFORMED, "x.json", "''"),
    "a bad line": (
        "x.jsonl",
        '{"file_name": "a", "text": "b"}\n{',
        MALFORMED,
        "x.jsonl, line 2: not JSON",
    ),
    "a list a line": ("x.jsonl", "[1]", MALFORMED, "line 1: not an object: [1]"),
    "no file_name": (
        "x.jsonl",
        '{"image": "a.png", "text": "b"}',
        MALFORMED,
        "line 1: no 'file_name' among",
    ),
    "no column": (
        "x.csv",
        "image,text\na,b\n",
        MALFORMED,
        "x.csv: no 'file_name' among 'image', 'text'",
    ),
    "two columns": ("x.csv", "file_name,text,caption\na,b,c\n", MALFORMED, "'caption', 'text'"),
    "other columns": ("x.csv", "file_name,one,two\na,b,c\n", MALFORMED, "'one', 'two'"),
    "a comma": (
        "x.csv",
        "file_name,text\na.png,one, two\n",
        MALFORMED,
        "line 2: 3 columns, the first line",
    ),
    "an open quote": ("x.csv", 'file_name,text\na.png,"one\n', MALFORMED, "not CSV"),
    "an empty table": ("x.csv", "", MALFORMED, "no 'file_name'"),
    "another kind": ("x.parquet", "PAR1", MALFORMED, ".json, .jsonl or .csv"),
    "COCO, no id": (
        "x.json",
        '{"images": [{"file_name": "a"}], "annotations": []}',
        MALFORMED,
        "images[0]",
    ),
    "COCO, a list": (
        "x.json",
        '{"images": [{"id": [1], "file_name": "a"}], "annotations": []}',
        MALFORMED,
        "images[0]: 'id' is [1]",
    ),
    "COCO, twice": (
        "x.json",
        '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
        MALFORMED,
        "images[1]: id 1 is 'a' too",
    ),
    "COCO, unknown": (
        "x.json",
        '{"images": [], "annotations": [{"image_id": 7, "caption": "x"}]}',
        MALFORMED,
        "annotations[0]: no image has the id 7",
    ),
    "COCO, bare": (
        "x.json",
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": []}',
        "captions.missing",
        "1 of 1",
        "'a'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(tmp_path: Path, case: str) -> None:
    name, text, code, *facts = BAD[case]
    with raises(EvaluationError, code, *facts) as caught:
        read_captions(write(tmp_path / name, text))
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("x.csv", "x.jsonl", "x.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(EvaluationError, match=r"can't be read|not JSON"):
            read_captions(tmp_path / name)
    for name in ("none.csv", "none.json"):
        with pytest.raises(EvaluationError, match=r"No such file|no such file"):
            read_captions(tmp_path / name)


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for name in BOTH:
        Image.new("RGB", (8, 8), "red").save(pictures / name)
    return pictures


@pytest.mark.parametrize("name", ["captions.json", "metadata.csv", "metadata.jsonl"])
def test_captions_are_found_in_the_folder(folder: Path, name: str) -> None:
    write(folder / name, FILES[name])
    data = captioned_pictures(folder)
    assert data.name == "pictures"
    assert [(one.name, one.references) for one in data.examples] == [*BOTH.items()]
    assert list(data.images()) == [folder / "b.png", folder / "sub/a.png"]
    assert len(captioned_pictures(folder, limit=1)) == 1


def test_captions_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "coco.json", FILES["coco.json"])
    assert len(captioned_pictures(folder, file)) == 2


def test_no_captions_and_too_many(folder: Path) -> None:
    with raises(EvaluationError, "captions.no-file", "captions.json, metadata"):
        find_captions(folder)
    for name in ("captions.json", "metadata.csv"):
        write(folder / name, FILES[name])
    with raises(EvaluationError, "captions.no-file", "2", "captions.json, metadata"):
        captioned_pictures(folder)
    assert len(captioned_pictures(folder, folder / "metadata.csv")) == 2


def test_pictures_that_are_not_there_are_all_named(folder: Path) -> None:
    names: dict[str, Any] = {"b.png": "x", "c.png": "x", "d.png": "x"}
    write(folder / "captions.json", json.dumps(names))
    with raises(EvaluationError, "captions.image-missing", "2", "3", "'c.png', 'd.png'"):
        captioned_pictures(folder)


def test_pictures_without_captions(folder: Path, tmp_path: Path) -> None:
    """A file in the folder speaks for all of it; one that is named may choose."""
    text = json.dumps({"b.png": "a b"})
    file = write(tmp_path / "some.json", text)
    assert captioned_pictures(folder, file).left_out == ("sub/a.png",)
    write(folder / "captions.json", text)
    with raises(EvaluationError, "captions.missing", "1", "'sub/a"):
        captioned_pictures(folder)


def test_what_is_no_folder(folder: Path) -> None:
    for path, why in ((folder / "b.png", "a file, expected"), (folder / "no", "no such folder")):
        with pytest.raises(EvaluationError, match=why):
            captioned_pictures(path)


# Scenes


def test_the_first_scenes_are_the_same_for_any_limit() -> None:
    few, more = drawn_scenes(3), drawn_scenes(5)
    assert more.examples[:3] == few.examples
    assert few.name == more.name == SCENES
    assert few.sha256 != more.sha256
    assert len(drawn_scenes(10_000)) == len(drawn_scenes()) == 1000
    for limit in (0, -1):
        with raises(OptionError, "option.wrong-value", "1"):
            drawn_scenes(limit)
