"""`vlmport export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.app import app
from vlmport.cli.arguments import Adapter, Revision
from vlmport.cli.console import export_progress, say


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="Checkpoint folder, Hub id or built-in name.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="OUT")],
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            help="Of fp32, fp16, q8, q4, q4f16, with commas; by default fp32,q8,q4, as far as this "
            "model can have them.",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Form of folder: hub; components (a captioner's four files); fused (two graphs "
            "without a cache); genai (onnxruntime-genai's)."
        ),
    ] = "hub",
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            help="Of the layout fused: the size of every picture.",
            metavar="WIDTHxHEIGHT",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            help="Most that a file of weights may hold, such as 500MB; at most 2GB, the default.",
            metavar="SIZE",
        ),
    ] = None,
    adapter: Adapter = None,
    ignore_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore-weights",
            help="Leave out tensors that the model does not need, such as 'model.talker.*'; can be "
            "repeated.",
            metavar="GLOB",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a bundle.")] = False,
    revision: Revision = None,
) -> None:
    """Export a checkpoint to a bundle: graphs, tokenizer, manifest, model card."""
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
    precisions = ", ".join(bundle.manifest.precisions)
    next_step = ["vlmport", "verify", str(out), "--reference", source]
    if adapter is not None:
        next_step += ["--adapter", adapter]
    if revision is not None:
        next_step += ["--revision", revision]
    say(f"{out}: {precisions}, {size / 1e6:.1f} MB")
    say(f"next: {shlex.join(next_step)}")
