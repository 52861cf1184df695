"""`vlmport demo`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from vlmport import signals
from vlmport.builtin import CAPTIONER
from vlmport.cli.app import app
from vlmport.cli.arguments import Model
from vlmport.cli.console import export_progress
from vlmport.cli.output import show


@app.command()
def demo(
    model: Model = CAPTIONER,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=0, max=65535)] = 8000,
) -> None:
    """Serve a page that captions in the browser, with a model in it."""
    from vlmport.demo import make_server
    from vlmport.loading import resolve

    with export_progress() as progress:
        bundle = resolve(model, progress=progress)
    server = make_server(bundle, port)
    show(server.url)
    with contextlib.closing(server):
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # how it is meant to end
            signals.heard()
