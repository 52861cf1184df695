"""`vlmport demo`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from vlmport import signals
from vlmport.builtin import CAPTIONER
from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Model
from vlmport.cli.console import export_progress
from vlmport.cli.output import show


@app.command(cls=SectionedCommand)
def demo(
    model: Model = CAPTIONER,
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
) -> None:
    """Run a model in the browser.

    Serves a web page on this machine, for this machine only, until Ctrl-C.
    """
    from vlmport.demo import make_server
    from vlmport.loading import resolve

    with export_progress() as progress:
        bundle = resolve(model, progress=progress)
    server = make_server(bundle, port)
    show(server.url)
    with contextlib.closing(server):
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # Ctrl-C is the way to end it
            signals.heard()
