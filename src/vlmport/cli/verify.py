"""`vlmport verify`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmport.cli.app import EXIT_FAILED, app
from vlmport.cli.arguments import Adapter, Revision
from vlmport.cli.console import stdout, verify_progress
from vlmport.errors import OptionError


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    reference: Annotated[
        str, typer.Option(help="The checkpoint that it was made from.", metavar="CHECKPOINT")
    ],
    precision: Annotated[
        str | None, typer.Option("--precision", "-p", help="Precisions, with commas.")
    ] = None,
    adapter: Adapter = None,
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture to add; can be repeated.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")
    ] = None,
    revision: Revision = None,
) -> None:
    """Prove a bundle right against transformers on PyTorch, rung by rung."""
    from vlmport.verify import UnrecordedError
    from vlmport.verify import verify as verify_bundle

    if json_file is not None:
        _check_writable(json_file)
    unrecorded: UnrecordedError | None = None
    with verify_progress() as progress:
        try:
            result = verify_bundle(
                bundle,
                reference,
                precisions=None if precision is None else precision.split(","),
                adapter=adapter,
                revision=revision,
                images=images,
                console=stdout,
                progress=progress,
            )
        except UnrecordedError as error:
            result, unrecorded = error.report, error
    if json_file is not None:
        _write_json(json_file, result.to_json())
    if unrecorded is not None:
        raise unrecorded
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


def _check_writable(path: Path) -> None:
    """Raise OptionError, before minutes of work, where --json can't be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"--json {path}: no folder {folder}", hint="make the folder first")
    if path.is_dir():
        raise OptionError(f"--json {path}: a folder, expected a file", hint="name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(f"--json {path}: not writable", hint="check its permissions")


def _write_json(path: Path, value: Any) -> None:
    """Raise OptionError where it can't be written."""
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--json {path}: {error.strerror or error}", hint="is the disk full?"
        ) from error
