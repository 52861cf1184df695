"""`vlmport inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.builtin import builtin_folder
from vlmport.cli.app import EXIT_FAILED, SectionedCommand, app
from vlmport.cli.arguments import Device
from vlmport.cli.console import command_line, export_progress, report, say, stdout
from vlmport.errors import BundleError, OptionError


@app.command(cls=SectionedCommand)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Bundle, ONNX file, folder of ONNX files, or built-in name.", metavar="PATH"
        ),
    ],
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Check the hashes of a bundle, run its golden input, and compare the results.",
        ),
    ] = False,
    device: Device = "cpu",
) -> None:
    """Show what is in a bundle or an ONNX file.

    Prints inputs, outputs, sizes, and the recorded results of verify and eval.
    """
    from vlmport.bundle import Bundle, is_bundle
    from vlmport.inspection import describe, describe_onnx, probe_bundle

    if builtin_folder(path) is not None:
        from vlmport.loading import resolve  # a built-in model is exported once, into the cache

        with export_progress() as progress:
            path = resolve(str(path), progress=progress).folder
    if not _exists(path):
        raise BundleError(
            f"{path}: no such file or folder",
            hint="check the path; `vlmport models` lists the built-in names",
            code="source.not-found",
        )
    if is_bundle(path):
        opened = Bundle.open(path, check_hashes=probe)
        describe(opened, stdout)
        if probe and not probe_bundle(opened, device, stdout):
            raise typer.Exit(EXIT_FAILED)
        return
    if probe:
        raise OptionError(
            f"{path}: --probe needs a bundle, and this has no vlmport.json",
            hint="leave out --probe, or export the bundle again",
            code="bundle.no-manifest",
        )
    if path.is_file():
        describe_onnx(path, stdout)
    else:
        _list_files(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long
        return False


def _list_files(folder: Path) -> None:
    """List the ONNX files of a folder that is no bundle."""
    from vlmport.bundle import is_bundle
    from vlmport.files.onnx_file import find_onnx
    from vlmport.inspection import describe_folder

    files = find_onnx(folder)
    problems = describe_folder(folder, files, stdout)
    above = folder.resolve().parent
    what = f"part of {above}" if is_bundle(above) else "not a vlmport bundle (no vlmport.json)"
    say(f"{folder}: {what}; {len(files)} ONNX files")
    say(f"next: {command_line(['vlmport', 'inspect', str(files[0])])}")
    for problem in problems:
        report(problem)
    if problems:
        raise typer.Exit(BundleError.exit_code)
