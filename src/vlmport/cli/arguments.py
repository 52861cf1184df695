"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Built-in name, bundle, checkpoint folder or Hub id.", metavar="SRC"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, … as the installed ONNX Runtime offers.")]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.", min=1)]
Adapter = Annotated[
    str | None,
    typer.Option(help="PEFT folder or Hub id, whose LoRA is merged in.", metavar="SRC"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
