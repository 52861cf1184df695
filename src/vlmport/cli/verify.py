"""`vlmport verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.app import EXIT_FAILED, app
from vlmport.cli.arguments import Adapter, Revision
from vlmport.cli.console import say, stdout, verify_progress
from vlmport.cli.json_file import JsonFile, check_writable, write_json


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    reference: Annotated[
        str, typer.Option(help="The checkpoint that it was made from.", metavar="CHECKPOINT")
    ],
    precision: Annotated[
        str | None,
        typer.Option("--precision", "-p", help="Precisions, with commas; by default all."),
    ] = None,
    adapter: Adapter = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", help="A picture to add; can be repeated.", metavar="FILE"),
    ] = None,
    json_file: JsonFile = None,
    revision: Revision = None,
) -> None:
    """Prove a bundle right against transformers on PyTorch, rung by rung."""
    from vlmport.parity import UnrecordedError
    from vlmport.parity import verify as verify_bundle

    if json_file is not None:
        check_writable(json_file)
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
        write_json(json_file, result.to_json())
    if unrecorded is not None:
        raise unrecorded
    say(f"written into {bundle}: vlmport.json, README.md")
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)
