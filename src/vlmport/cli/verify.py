"""`vlmport verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.app import EXIT_FAILED, SectionedCommand, app
from vlmport.cli.arguments import Adapter, Revision
from vlmport.cli.console import export_progress, say, stdout, verify_progress
from vlmport.cli.json_file import JsonFile, check_writable, write_json


@app.command(cls=SectionedCommand)
def verify(
    bundle: Annotated[
        str, typer.Argument(help="Folder of the bundle, or a built-in name.", metavar="BUNDLE")
    ],
    reference: Annotated[
        str,
        typer.Option(
            help="The checkpoint that the bundle was exported from: a folder, Hub id or built-in "
            "name.",
            metavar="CHECKPOINT",
        ),
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            help="Precisions, separated by commas (default: all of the bundle).",
        ),
    ] = None,
    adapter: Adapter = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="Image of your own to compare as well; can be repeated.", metavar="FILE"
        ),
    ] = None,
    json_file: JsonFile = None,
    revision: Revision = None,
) -> None:
    """Compare a bundle with PyTorch.

    Each step from the image to the text is compared with transformers on PyTorch, at each
    precision. The result is printed, and recorded in the bundle.
    """
    from vlmport.loading import open_bundle
    from vlmport.parity import UnrecordedError
    from vlmport.parity import verify as verify_bundle

    if json_file is not None:
        check_writable(json_file)
    names = None if precision is None else precision.split(",")
    with export_progress() as exporting:
        opened = open_bundle(bundle, precisions=names or (), progress=exporting)
    unrecorded: UnrecordedError | None = None
    with verify_progress() as progress:
        try:
            result = verify_bundle(
                opened,
                reference,
                precisions=names,
                adapter=adapter,
                revision=revision,
                images=images,
                console=stdout,
                progress=progress,
            )
        except UnrecordedError as error:
            result, unrecorded = error.report, error
    if json_file is not None:
        write_json(json_file, result.to_json())
    if unrecorded is not None:
        raise unrecorded
    say(f"result written into {opened.folder}: vlmport.json, README.md")
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)
