"""`--json FILE`: refused before the work where it can't be written, written whole after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmport.errors import OptionError

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")
]


def check_writable(path: Path) -> None:
    """Raise OptionError, before minutes of work, where --json can't be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(
            f"--json {path}: no folder {folder}",
            hint="make the folder first",
            code="output.unwritable",
        )
    if path.is_dir():
        raise OptionError(
            f"--json {path}: a folder, expected a file",
            hint="name a file in it",
            code="output.unwritable",
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(
            f"--json {path}: not writable", hint="check its permissions", code="output.unwritable"
        )


def write_json(path: Path, value: Any) -> None:
    """Raise OptionError where it can't be written."""
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--json {path}: {error.strerror or error}",
            hint="is the disk full?",
            code="output.unwritable",
        ) from error
