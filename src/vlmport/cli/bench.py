"""`vlmport bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Device, Source, Threads, split_names
from vlmport.cli.console import bench_progress, export_progress, say

Precisions = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        help="Precisions, separated by commas, or one mix (default: auto and all of the bundle).",
    ),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        help="Number of tokens of a prompt; can be repeated (default: 100 and 1100).",
        metavar="N",
        min=1,
    ),
]
Rounds = Annotated[int, typer.Option(help="Number of rounds; medians are reported.", min=1)]
NewTokens = Annotated[
    int, typer.Option(help="Number of tokens to decode after each prompt.", min=2)
]
Cold = Annotated[
    bool, typer.Option(help="Also start a process for each precision: first caption, memory.")
]


@app.command(cls=SectionedCommand)
def bench(
    bundle: Source,
    precision: Precisions = None,
    lengths: Lengths = None,
    rounds: Rounds = 5,
    new_tokens: NewTokens = 32,
    cold: Cold = True,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Measure how fast a bundle is on this machine.

    Prints a table, then one line of JSON.
    """
    from vlmport.benchmark import LENGTHS
    from vlmport.benchmark import bench as measure
    from vlmport.loading import resolve, to_export

    names = split_names(precision)
    with export_progress() as exporting:
        opened = resolve(bundle, precisions=to_export(names), progress=exporting)
    with bench_progress() as progress:
        report = measure(
            opened,
            precisions=names or None,
            lengths=lengths or LENGTHS,
            rounds=rounds,
            new_tokens=new_tokens,
            threads=threads,
            device=device,
            cold=cold,
            progress=progress,
        )
    for note in report.notes:
        say(f"left out: {note}")
    machine, settings = report.machine, report.settings
    print(f"{report.bundle}, medians of {settings['rounds']} rounds")
    print(f"{machine['cpu']}, {machine['cores']} cores, threads: {machine['threads']}")
    for name, engine in settings["engines"].items():
        if engine != "cpu":
            print(f"{name} on {engine}")
    for line in report.lines():
        print(line)
    print(json.dumps(report.to_json()))
