"""`vlmport ask`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlmport.builtin import ANSWERER
from vlmport.cli.answers import errors_as_rows, json_row, stripped
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
from vlmport.cli.decoding_options import GeneratingCommand, decoding_of
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import ImageError, PromptError, quoted
from vlmport.runtime.images.uris import is_address

# A last argument that ends like this, without a space, is meant as a file.
SUFFIXES = re.compile(r"\S+\.(png|jpe?g|webp|avif|gif|bmp|tiff?|heic|svg|pdf|mp4)", re.I)


@app.command(cls=GeneratingCommand)
def ask(
    ctx: typer.Context,
    *,
    arguments: Annotated[
        list[str],
        typer.Argument(help="Images, if any, then the question.", metavar="[IMAGE]... TEXT"),
    ],
    model: Model = ANSWERER,
    system: Annotated[
        str | None, typer.Option(help="System message before the question.", metavar="TEXT")
    ] = None,
    precision: Precision = "auto",
    device: Device = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text as it is generated.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Threads = None,
    tune: Tune = True,
    adapter: Adapter = None,
    revision: Revision = None,
    verify_hashes: VerifyHashes = False,
    image_option: ImageOptions = None,
) -> None:
    """Ask one question about images.

    The last argument is the question, the arguments before it are images. There may
    be no image. A single image without a question is captioned.
    """
    check_output(stream=stream, as_json=as_json)
    with errors_as_rows({"images": arguments[:-1], "question": arguments[-1]}, as_json=as_json):
        images, question = read_arguments(arguments)
    options, decoding = read_image_options(image_option), decoding_of(ctx)
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
        chat = vlm.conversation(system, image_options=options)
        if stream:
            for piece in stripped(chat.stream(question, images, **decoding)):
                show(piece, end="")
            show()
            return
        asked = {"images": images, "question": question}
        with errors_as_rows(asked, as_json=as_json):
            answer = chat.ask(question, images, **decoding)
    if as_json:
        show(json_row(asked, "answer", answer))
        return
    for one in (answer, *answer.alternatives):
        show(one.text.strip())


def read_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Split the arguments into images and the question: the last, unless a file has that name.

    Raises ImageError for an image that does not exist, PromptError for images without a question.
    """
    *images, question = arguments
    asked: str | None = question
    if _exists(question):
        images, asked = [*images, question], None
    elif not question.strip():
        raise PromptError(
            "the question is empty",
            hint='for example vlmport ask photo.jpg "What is this?"',
            code="prompt.no-question",
        )
    elif SUFFIXES.fullmatch(question):
        raise ImageError(
            f"{question}: no such file",
            hint="check the path; a question comes last, after the images",
            code="image.not-found",
        )
    for image in images:
        if not _exists(image):
            raise ImageError(
                f"{image}: no such file",
                hint="all arguments but the last are images; put the question in quotes",
                code="image.not-found",
            )
    if asked is None and len(images) > 1:
        kind = "a folder" if os.path.isdir(question) else "a file"
        kind = "an address" if is_address(question) else kind
        raise PromptError(
            f"no question: the last argument {quoted(question)} is {kind}",
            hint="put the question last; `vlmport caption` captions several images",
            code="prompt.no-question",
        )
    return images, asked


def _exists(name: str) -> bool:
    """Whether a file has this name, or it is an address. A question may be too long for a name."""
    if is_address(name):
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
