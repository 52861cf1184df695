"""`vlmport caption`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmport.builtin import CAPTIONER
from vlmport.cli.answers import json_row, stripped
from vlmport.cli.app import app
from vlmport.cli.arguments import (
    Adapter,
    Device,
    ImageOptions,
    Model,
    NoSplit,
    Precision,
    Revision,
    Threads,
    VerifyHashes,
    read_image_options,
)
from vlmport.cli.console import report
from vlmport.cli.decoding_options import with_decoding
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import ImageError, OptionError, PromptError, VlmportError, cut

if TYPE_CHECKING:
    from vlmport.runtime.model import VLM


@app.command()
@with_decoding
def caption(
    *,
    images: Annotated[list[str], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    model: Model = CAPTIONER,
    precision: Precision = "auto",
    device: Device = "cpu",
    stream: Annotated[bool, typer.Option("--stream", help="Print as it is generated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a picture.")] = False,
    threads: Threads = None,
    adapter: Adapter = None,
    revision: Revision = None,
    verify_hashes: VerifyHashes = False,
    image_option: ImageOptions = None,
    no_split: NoSplit = False,
    decoding: dict[str, Any],
) -> None:
    """Caption pictures."""
    if stream and as_json:
        raise OptionError(
            "--stream and --json contradict each other",
            hint="choose one",
            code="option.contradiction",
        )
    decoding["image_options"] = read_image_options(image_option, no_split)
    vlm = open_model(
        model,
        precision=precision,
        device=device,
        threads=threads,
        adapter=adapter,
        revision=revision,
        verify_hashes=verify_hashes or None,
    )
    with vlm:
        worst = (
            _stream_captions(vlm, images, decoding)
            if stream
            else _print_captions(vlm, images, decoding, as_json=as_json)
        )
    if worst is not None:
        raise typer.Exit(worst.exit_code)


def _print_captions(
    vlm: VLM, paths: list[str], options: dict[str, Any], *, as_json: bool
) -> VlmportError | None:
    """A bad picture is reported and the others are captioned all the same."""
    failure: VlmportError | None = None
    for path, result in zip(paths, vlm.caption_each(paths, **options), strict=True):
        if isinstance(result, VlmportError):
            report(result)
            failure = result
        elif as_json:
            show(json_row({"image": path}, "caption", result))
        else:
            for answer in (result, *result.alternatives):
                text = answer.text.strip()
                show(f"{cut(path)}: {text}" if len(paths) > 1 else text)
    return failure


def _stream_captions(vlm: VLM, paths: list[str], options: dict[str, Any]) -> VlmportError | None:
    """Caption one by one, each piece of text as it comes."""
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
