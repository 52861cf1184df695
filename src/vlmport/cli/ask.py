"""`vlmport ask`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmport.builtin import ANSWERER
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
from vlmport.cli.decoding_options import with_decoding
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import ImageError, OptionError, PromptError, quoted
from vlmport.runtime.images.uris import is_address

# What ends so and holds no space is meant as a file.
SUFFIXES = re.compile(r"\S+\.(png|jpe?g|webp|avif|gif|bmp|tiff?|heic|svg|pdf|mp4)", re.I)


@app.command()
@with_decoding
def ask(
    *,
    arguments: Annotated[
        list[str],
        typer.Argument(help="Pictures, if any, and the question last.", metavar="[IMAGE]... TEXT"),
    ],
    model: Model = ANSWERER,
    system: Annotated[
        str | None, typer.Option(help="A system message before the question.", metavar="TEXT")
    ] = None,
    precision: Precision = "auto",
    device: Device = "cpu",
    stream: Annotated[bool, typer.Option("--stream", help="Print as it is generated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    threads: Threads = None,
    adapter: Adapter = None,
    revision: Revision = None,
    verify_hashes: VerifyHashes = False,
    image_option: ImageOptions = None,
    no_split: NoSplit = False,
    decoding: dict[str, Any],
) -> None:
    """Ask one question about pictures, or about none.

    The last argument is the question, all before it are pictures. A picture alone is captioned.
    """
    if stream and as_json:
        raise OptionError(
            "--stream and --json contradict each other",
            hint="choose one",
            code="option.contradiction",
        )
    images, question = read_arguments(arguments)
    options = read_image_options(image_option, no_split)
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
        chat = vlm.conversation(system, image_options=options)
        if stream:
            for piece in stripped(chat.stream(question, images, **decoding)):
                show(piece, end="")
            show()
            return
        answer = chat.ask(question, images, **decoding)
    if as_json:
        asked = {"images": images, "question": question}
        show(json_row(asked, "answer", answer))
        return
    for one in (answer, *answer.alternatives):
        show(one.text.strip())


def read_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The pictures, and the question: the last argument, unless a file or folder has that name.

    Raises ImageError for a picture that is not there, PromptError for pictures without a question.
    """
    *images, question = arguments
    asked: str | None = question
    if _exists(question):
        images, asked = [*images, question], None
    elif not question.strip():
        raise PromptError(
            "the question is empty",
            hint='vlmport ask photo.jpg "What is this?"',
            code="prompt.no-question",
        )
    elif SUFFIXES.fullmatch(question):
        raise ImageError(
            f"{question}: no such file",
            hint="the question comes last, after the pictures",
            code="image.not-found",
        )
    for image in images:
        if not _exists(image):
            raise ImageError(
                f"{image}: no such file",
                hint="all but the last argument are pictures; put the question in quotes",
                code="image.not-found",
            )
    if asked is None and len(images) > 1:
        kind = "a folder" if os.path.isdir(question) else "a file"
        kind = "an address" if is_address(question) else kind
        raise PromptError(
            f"no question: the last argument {quoted(question)} is {kind}",
            hint="put the question last; `vlmport caption` captions several pictures",
            code="prompt.no-question",
        )
    return images, asked


def _exists(name: str) -> bool:
    """Whether something is there under this name, or it is an address, which is said later; a
    question may be too long for a name."""
    if is_address(name):
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
