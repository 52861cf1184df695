"""Options that several commands take."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vlmport.errors import OptionError, cut

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Built-in name, bundle, checkpoint folder or Hub id.", metavar="SRC"
    ),
]
Precision = Annotated[
    str,
    typer.Option("--precision", "-p", help="auto, fp32, q8, q4, … or vision=q8,decoder=q4."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, … as the installed ONNX Runtime offers.")]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.", min=1)]
Adapter = Annotated[
    str | None,
    typer.Option(help="PEFT folder or Hub id, whose LoRA is merged in.", metavar="SRC"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
VerifyHashes = Annotated[
    bool,
    typer.Option(
        "--verify-hashes", help="Compare all files of a bundle with the SHA-256 in its manifest."
    ),
]
ImageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--image-option",
        help="An option of the image processor, its value in JSON; can be repeated.",
        metavar="NAME=VALUE",
    ),
]
NoSplit = Annotated[
    bool,
    typer.Option("--no-split", help="Don't cut pictures into tiles: do_image_splitting=false."),
]


def read_image_options(given: list[str] | None, no_split: bool) -> dict[str, Any]:
    """What was given, for `image_options`. Raises OptionError for what can't be read."""
    options: dict[str, Any] = {"do_image_splitting": False} if no_split else {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            options[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError as error:
            raise OptionError(
                f"--image-option {cut(text)}: not JSON: {error}",
                hint="for example do_image_splitting=false",
                code="option.not-json",
            ) from error
    return options
