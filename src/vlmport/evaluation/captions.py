"""Read reference captions in the usual formats: image → its captions.

- `captions.json`: an object, file → caption or list of captions.
- COCO's caption annotations: an object with `images` and `annotations`.
- `metadata.csv` or `metadata.jsonl` of a Hugging Face imagefolder: `file_name`, and a column
  `text`, `caption` or `captions` (or the only other one).

An image that is listed twice has the captions of both entries.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmport.errors import EvaluationError, quoted, some_names
from vlmport.files.json_files import load_json

KNOWN_FILES = ("captions.json", "metadata.csv", "metadata.jsonl")
TEXT_COLUMNS = ("text", "caption", "captions")
FILE_COLUMN = "file_name"
FORMS = (
    'captions.json {"a.jpg": "a caption", …}, COCO caption annotations, or metadata.csv or '
    "metadata.jsonl with file_name and text"
)


def find_captions(folder: Path) -> Path:
    """Find the file of captions in a folder. Raises EvaluationError unless there is exactly one."""
    found = [name for name in KNOWN_FILES if (folder / name).is_file()]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise EvaluationError(
            f"{folder}: {len(found)} files of captions: {', '.join(found)}",
            hint="choose one with --captions",
            code="captions.no-file",
        )
    raise EvaluationError(
        f"{folder}: no file of captions, expected one of {', '.join(KNOWN_FILES)}",
        hint=f"write one of them, or name another file with --captions; the forms are: {FORMS}",
        code="captions.no-file",
    )


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a file of captions: image → its captions, in the order of the file.

    Raises EvaluationError for a file that can't be read or has another format, and for images
    without a caption, naming them.
    """
    readers = {".csv": _from_csv, ".jsonl": _from_json_lines, ".json": _from_json}
    if path.suffix.lower() not in readers:
        raise EvaluationError(
            f"{path}: not a file of captions, expected .json, .jsonl or .csv",
            hint=FORMS,
            code="captions.malformed",
        )
    captions: dict[str, list[str]] = {}
    for where, name, given in readers[path.suffix.lower()](path):
        if not isinstance(name, str) or not name:
            raise EvaluationError(
                f"{where}: the name of an image is {quoted(name)}",
                hint=FORMS,
                code="captions.malformed",
            )
        captions.setdefault(name, []).extend(_texts(given, f"{where}: {name}"))
    if not captions:
        raise EvaluationError(f"{path}: no captions in it", hint=FORMS, code="captions.missing")
    if bare := [name for name, texts in captions.items() if not texts]:
        raise EvaluationError(
            f"{path}: {len(bare)} of {len(captions)} images have no caption: {some_names(bare)}",
            hint="add captions, or remove these images from the file",
            code="captions.missing",
        )
    return {name: tuple(texts) for name, texts in captions.items()}


Entry = tuple[str, Any, Any]  # the place in the file, for errors; the image; its captions


def _texts(given: Any, where: str) -> list[str]:
    """Check one caption or a list of them; leave out blank ones and spaces at the ends."""
    texts = [given] if isinstance(given, str) else given
    if texts is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise EvaluationError(
            f"{where}: a caption is text or a list of texts, not {json.dumps(given)[:60]}",
            hint=FORMS,
            code="captions.malformed",
        )
    return [text.strip() for text in texts if text.strip()]


def _from_json(path: Path) -> Iterator[Entry]:
    raw = load_json(path, error=EvaluationError, hint=FORMS)
    if isinstance(raw.get("images"), list) and isinstance(raw.get("annotations"), list):
        yield from _from_coco(raw, path)
        return
    for name, given in raw.items():
        yield str(path), name, given


def _from_coco(raw: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    """Read COCO's caption annotations.

    Source: the format of captions_val2017.json, cocodataset.org, "Caption annotations".
    """
    names: dict[Any, str] = {}
    for number, image in enumerate(raw["images"]):
        where = f"{path}: images[{number}]"
        key, name = _fields(image, where, "id", FILE_COLUMN)
        if names.setdefault(key, name) != name:
            raise EvaluationError(
                f"{where}: id {quoted(key)} is {quoted(names[key])} too",
                hint=FORMS,
                code="captions.malformed",
            )
        yield where, name, []  # an image without an annotation has no caption
    for number, annotation in enumerate(raw["annotations"]):
        where = f"{path}: annotations[{number}]"
        key, given = _fields(annotation, where, "image_id", "caption")
        if key not in names:
            raise EvaluationError(
                f"{where}: no image has the id {quoted(key)}", hint=FORMS, code="captions.malformed"
            )
        yield where, names[key], given


def _fields(row: Any, where: str, key: str, value: str) -> tuple[Any, Any]:
    if not isinstance(row, Mapping) or key not in row or value not in row:
        raise EvaluationError(
            f"{where}: expected an object with {key!r} and {value!r}",
            hint=FORMS,
            code="captions.malformed",
        )
    if not isinstance(row[key], str | int):
        raise EvaluationError(
            f"{where}: {key!r} is {quoted(row[key])}", hint=FORMS, code="captions.malformed"
        )
    return row[key], row[value]


def _from_json_lines(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"{where}: not JSON: {error}", hint=FORMS, code="captions.malformed"
            ) from error
        if not isinstance(row, Mapping):
            raise EvaluationError(
                f"{where}: not an object: {line[:60]}", hint=FORMS, code="captions.malformed"
            )
        column = _text_column(row, where)
        yield where, row[FILE_COLUMN], row[column]


def _from_csv(path: Path) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(rows, [])
        column = header.index(_text_column(header, str(path)))
        name = header.index(FILE_COLUMN)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                if not row:
                    continue
                raise EvaluationError(
                    f"{where}: {len(row)} columns, the first line has {len(header)}",
                    hint='put a caption with a comma into "quotes"',
                    code="captions.malformed",
                )
            yield where, row[name], row[column]
    except csv.Error as error:
        raise EvaluationError(
            f"{path}, line {rows.line_num}: not CSV: {error}",
            hint="look for a quote that is not closed",
            code="captions.malformed",
        ) from error


def _text_column(columns: Iterable[str], where: str) -> str:
    """Find the column of captions: by its name, else the only one next to file_name."""
    names = list(columns)
    if FILE_COLUMN not in names:
        raise EvaluationError(
            f"{where}: no {FILE_COLUMN!r} among {some_names(map(str, names))}",
            hint=FORMS,
            code="captions.malformed",
        )
    others = [name for name in names if name != FILE_COLUMN]
    known = [name for name in others if name in TEXT_COLUMNS]
    for choice in (known, others):
        if len(choice) == 1:
            return choice[0]
    raise EvaluationError(
        f"{where}: no column is clearly the caption; there are {some_names(map(str, others))}",
        hint="name one of them 'text', and none of the others 'caption' or 'captions'",
        code="captions.malformed",
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(
            f"{path}: can't be read: {reason}",
            hint="save the file as UTF-8",
            code="source.unreadable",
        ) from error
