"""`vlmport app`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from vlmport import signals
from vlmport.builtin import ANSWERER
from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Device, Precision, Threads
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import DependencyError


@app.command("app", cls=SectionedCommand)
def page(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Built-in name, bundle, checkpoint folder or Hub id "
            f"(default: {ANSWERER}); with --server, a name that it serves.",
            metavar="[MODEL]",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 7860,
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of a running `vlmport serve`, which then answers.", metavar="URL"
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File whose first key is the one for --server.", metavar="FILE"),
    ] = None,
    precision: Precision = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Caption images and hold conversations on a Gradio page.

    Serves a web page on this machine, for this machine only, until Ctrl-C.
    """
    from vlmport.serve.settings import read_api_keys

    try:
        from vlmport.app.answering import LocalAnswering, RemoteAnswering
        from vlmport.app.server import open_server
    except ImportError as error:
        raise DependencyError(
            f"vlmport app needs the package {error.name}",
            hint="pip install 'vlmport[app]'",
            code="dependency.missing",
        ) from error
    with contextlib.ExitStack() as stack:
        if server is None:
            source = model or ANSWERER
            vlm = stack.enter_context(
                open_model(source, precision=precision, device=device, threads=threads)
            )
            answering = LocalAnswering(Path(source).name if Path(source).exists() else source, vlm)
        else:
            key = None if api_key_file is None else read_api_keys(api_key_file)[0]
            answering = RemoteAnswering(server, model, key)
        stack.callback(answering.close)
        opened = stack.enter_context(open_server(answering, port))
        show(opened.url)
        try:
            opened.serve_forever()
        except KeyboardInterrupt:  # Ctrl-C is the way to end it
            signals.heard()
