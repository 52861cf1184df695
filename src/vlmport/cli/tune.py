"""`vlmport tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Source
from vlmport.cli.console import export_progress, say

Seconds = Annotated[int, typer.Option(help="About how long to measure.", min=1)]


@app.command(cls=SectionedCommand)
def tune(bundle: Source, seconds: Seconds = 120) -> None:
    """Find the fastest way to run a bundle on this machine, and keep it.

    Tries the forms that `vlmport verify` has passed, the engines that are installed, kernels and
    threads. A choice may be no further from float32 than `auto` is. Of a bundle without results of
    `vlmport verify`, only the number of threads is tried. Later commands take what was found, and
    say so; --no-tune ignores it.
    """
    from vlmport.benchmark.tuning import tune as measure
    from vlmport.loading import resolve

    with export_progress() as exporting:
        opened = resolve(bundle, progress=exporting)
    report = measure(opened, seconds=seconds)
    print(f"{report.bundle}: times of a run, and shares of the time of auto")
    for line in report.lines():
        print(line)
    if not report.verified:
        say(
            "the bundle holds no results of `vlmport verify`, so only the number of threads was "
            "tried, which changes no number"
        )
    if all(one.seconds is None for one in report.tried):
        say("nothing could be measured in the time, so nothing is kept; give more --seconds")
        return
    print(f"chosen: {report.tuning}")
    if report.path is None:
        say("the cache can't be written, so nothing is kept; set VLMPORT_CACHE to another folder")
