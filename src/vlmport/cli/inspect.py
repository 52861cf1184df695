"""`vlmport inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.app import EXIT_FAILED, app
from vlmport.cli.arguments import Device
from vlmport.cli.console import stdout


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    probe: Annotated[
        bool, typer.Option("--probe", help="Check all hashes, and run the stored golden input.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Show what is in a bundle: components, inputs and outputs, sizes, parity."""
    from vlmport.bundle import Bundle
    from vlmport.inspection import describe, probe_bundle

    opened = Bundle.open(bundle, check_hashes=probe)
    describe(opened, stdout)
    if probe and not probe_bundle(opened, device, stdout):
        raise typer.Exit(EXIT_FAILED)
