"""`vlmport caption`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmport.builtin import CAPTIONER
from vlmport.cli.answers import error_row, json_row, stripped
from vlmport.cli.app import app
from vlmport.cli.arguments import (
    Adapter,
    Device,
    ImageOptions,
    Model,
    Precision,
    Revision,
    Threads,
    Tune,
    VerifyHashes,
    check_output,
    read_image_options,
)
from vlmport.cli.console import report
from vlmport.cli.decoding_options import GeneratingCommand, decoding_of
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import ImageError, PromptError, VlmportError, cut

if TYPE_CHECKING:
    from vlmport.runtime.model import VLM


@app.command(cls=GeneratingCommand)
def caption(
    ctx: typer.Context,
    *,
    images: Annotated[list[str], typer.Argument(help="Image files.", metavar="IMAGE")],
    model: Model = CAPTIONER,
    precision: Precision = "auto",
    device: Device = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text as it is generated.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object for each image, failed ones included."),
    ] = False,
    threads: Threads = None,
    tune: Tune = True,
    adapter: Adapter = None,
    revision: Revision = None,
    verify_hashes: VerifyHashes = False,
    image_option: ImageOptions = None,
) -> None:
    """Caption images.

    An image that can't be read is reported, and the others are captioned. With several images, each
    line begins with the name of its file.
    """
    check_output(stream=stream, as_json=as_json)
    options = decoding_of(ctx) | {"image_options": read_image_options(image_option)}
    vlm = open_model(
        model,
        precision=precision,
        device=device,
        threads=threads,
        tune=tune,
        adapter=adapter,
        revision=revision,
        verify_hashes=verify_hashes or None,
    )
    with vlm:
        worst = (
            _stream_captions(vlm, images, options)
            if stream
            else _print_captions(vlm, images, options, as_json=as_json)
        )
    if worst is not None:
        raise typer.Exit(worst.exit_code)


def _print_captions(
    vlm: VLM, paths: list[str], options: dict[str, Any], *, as_json: bool
) -> VlmportError | None:
    """Print captions batch by batch. Returns the last error, after the others are captioned."""
    failure: VlmportError | None = None
    for path, result in zip(paths, vlm.caption_each(paths, **options), strict=True):
        if isinstance(result, VlmportError):
            report(result)
            failure = result
            if as_json:
                show(error_row({"image": path}, result))
        elif as_json:
            show(json_row({"image": path}, "caption", result))
        else:
            for answer in (result, *result.alternatives):
                text = answer.text.strip()
                show(f"{cut(path)}: {text}" if len(paths) > 1 else text)
    return failure


def _stream_captions(vlm: VLM, paths: list[str], options: dict[str, Any]) -> VlmportError | None:
    """Print each piece of text as it comes. Returns the last error."""
    failure: VlmportError | None = None
    for path in paths:
        try:
            pieces = vlm.stream(path, **options)
        except (ImageError, PromptError) as error:
            report(error)
            failure = error
            continue
        show(f"{cut(path)}: " if len(paths) > 1 else "", end="")
        for piece in stripped(pieces):
            show(piece, end="")
        show()
    return failure
