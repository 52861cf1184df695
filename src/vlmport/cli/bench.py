"""`vlmport bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlmport.cli.app import app
from vlmport.cli.arguments import Threads
from vlmport.cli.console import bench_progress, export_progress, say


@app.command()
def bench(
    bundle: Annotated[
        str,
        typer.Argument(
            help="Bundle; a checkpoint, Hub id or built-in name is exported.", metavar="BUNDLE"
        ),
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            help="Precisions, with commas, or one mix; by default auto and all of the bundle.",
        ),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            help="Tokens of a prompt; can be repeated. [default: 100, 1100]",
            metavar="N",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Medians are of so many rounds.", min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded at each length.", min=2)] = 32,
    threads: Threads = None,
    cold: Annotated[bool, typer.Option(help="Also start a process for each precision.")] = True,
) -> None:
    """Measure how fast a bundle is on this CPU: a table, then one line of JSON."""
    from vlmport.benchmark import LENGTHS
    from vlmport.benchmark import bench as measure
    from vlmport.bundle.precisions import DEFAULT_PRECISIONS, split_precisions
    from vlmport.loading import resolve

    if precision is not None and "=" in precision:  # a mix has commas of its own
        names = (precision,)
    else:
        names = split_precisions(precision or "")
    exported = [*DEFAULT_PRECISIONS, *(n for n in names if "=" not in n and n != "auto")]
    with export_progress() as exporting:
        opened = resolve(bundle, precisions=split_precisions(exported), progress=exporting)
    with bench_progress() as progress:
        report = measure(
            opened,
            precisions=names or None,
            lengths=lengths or LENGTHS,
            rounds=rounds,
            new_tokens=new_tokens,
            threads=threads,
            cold=cold,
            progress=progress,
        )
    for note in report.notes:
        say(f"left out: {note}")
    machine, settings = report.machine, report.settings
    print(f"{report.bundle}, medians of {settings['rounds']} rounds")
    print(f"{machine['cpu']}, {machine['cores']} cores, threads: {machine['threads']}")
    for line in report.lines():
        print(line)
    print(json.dumps(report.to_json()))
