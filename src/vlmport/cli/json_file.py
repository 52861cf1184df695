"""`--json FILE`: checked before the work, written when it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmport.errors import OptionError

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file, as JSON.", metavar="FILE"),
]


def check_writable(path: Path) -> None:
    """Raise OptionError where the file can't be written, before minutes of work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(
            f"--json {path}: the folder {folder} does not exist",
            hint="create the folder first",
            code="output.unwritable",
        )
    if path.is_dir():
        raise OptionError(
            f"--json {path}: is a folder, expected a file",
            hint="give the name of a file in it",
            code="output.unwritable",
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(
            f"--json {path}: not writable", hint="check its permissions", code="output.unwritable"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON. Raises OptionError where the file can't be written."""
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--json {path}: {error.strerror or error}",
            hint="check the disk and its free space",
            code="output.unwritable",
        ) from error
