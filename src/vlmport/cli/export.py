"""`vlmport export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.bundle.layouts import LAYOUTS
from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Adapter, Revision
from vlmport.cli.console import command_line, export_progress, say

Source = Annotated[
    str, typer.Argument(help="Checkpoint folder, Hub id or built-in name.", metavar="SRC")
]
Out = Annotated[Path, typer.Argument(help="Folder of the new bundle.", metavar="OUT")]
Precisions = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        help="Precisions, separated by commas: fp32, fp16, q8, q4, q4f16 (default: fp32,q8,q4, "
        "without those that this model can't have).",
    ),
]
LayoutName = Annotated[
    str,
    typer.Option(
        help=f"Form of the folder: {'; '.join(map(str, LAYOUTS.values()))}.",
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        help="For --layout fused: the size of all images, in pixels.",
        metavar="WIDTHxHEIGHT",
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        help="Maximum size of a file of weights, such as 500MB (default and maximum: 2GB).",
        metavar="SIZE",
    ),
]
IgnoredWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-weights",
        help="Leave out tensors that the model does not need, such as 'model.talker.*'; can be "
        "repeated.",
        metavar="GLOB",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]


@app.command(cls=SectionedCommand)
def export(
    source: Source,
    out: Out,
    precision: Precisions = None,
    layout: LayoutName = "hub",
    image_size: ImageSize = None,
    max_shard_size: ShardSize = None,
    ignore_weights: IgnoredWeights = None,
    force: Force = False,
    adapter: Adapter = None,
    revision: Revision = None,
) -> None:
    """Export a checkpoint to a bundle.

    A bundle is a folder: ONNX graphs, weights, tokenizer, manifest (vlmport.json) and model card.
    """
    from vlmport.exporter import export as export_bundle

    with export_progress() as progress:
        bundle = export_bundle(
            source,
            out,
            precisions=precision,
            layout=layout,
            image_size=image_size,
            max_shard_size=max_shard_size,
            adapter=adapter,
            ignore_weights=ignore_weights or (),
            force=force,
            revision=revision,
            progress=progress,
        )
    size = sum(entry.size for entry in bundle.manifest.files.values())
    say(f"{out}: {', '.join(bundle.manifest.precisions)}, {size / 1e6:.1f} MB")
    verify = ["vlmport", "verify", str(out), "--reference", source]
    given = {"--adapter": adapter, "--revision": revision}
    options = [part for name, value in given.items() if value is not None for part in (name, value)]
    say(f"next: {command_line([*verify, *options])}")
