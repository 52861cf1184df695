"""Arguments and options that several commands take."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vlmport.errors import OptionError, cut

MODEL, IMAGES = "Model", "Images"  # headings in --help

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Built-in name, bundle, checkpoint folder or Hub id.",
        metavar="SRC",
        rich_help_panel=MODEL,
    ),
]
Source = Annotated[
    str,
    typer.Argument(help="Built-in name, bundle, checkpoint folder or Hub id.", metavar="BUNDLE"),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        "-p",
        help="auto, fp32, fp16, q8, q4, q4f16, or a mix such as vision=q8,decoder=q4.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, openvino:bf16 or another device that is installed, or a mix such as "
        "vision=openvino:bf16.",
        rich_help_panel=MODEL,
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune/--no-tune",
        help="Take what `vlmport tune` has found, where precision, device and threads are not "
        "given.",
        rich_help_panel=MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Number of threads of ONNX Runtime (default: one per core).",
        min=1,
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub id of a LoRA saved by PEFT; it is merged into the checkpoint.",
        metavar="SRC",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a Hub repository.", rich_help_panel=MODEL),
]
VerifyHashes = Annotated[
    bool,
    typer.Option(
        "--verify-hashes",
        help="Compare all files of a bundle with the SHA-256 in its manifest.",
        rich_help_panel=MODEL,
    ),
]
ImageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--image-option",
        help="Option of the image processor, its value in JSON; can be repeated. image_options "
        "in a bundle's vlmport.json lists the options that it has.",
        metavar="NAME=VALUE",
        rich_help_panel=IMAGES,
    ),
]


def read_image_options(given: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE texts for `image_options`. Raises OptionError for one that can't be read.

    The bundle says later whether it has an option of this name.
    """
    options: dict[str, Any] = {}
    for text in given or ():
        name, is_, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (is_ and name):
            raise OptionError(
                f"--image-option {cut(text)}: expected NAME=VALUE",
                hint="the value is JSON, for example NAME=false or NAME=500000",
                code="option.wrong-value",
            )
        try:
            options[name] = json.loads(value)
        except ValueError as error:
            raise OptionError(
                f"--image-option {cut(text)}: not JSON: {error}",
                hint="in JSON: true, false, 5, 0.5 or [5, 7]",
                code="option.not-json",
            ) from error
    return options


def split_names(precision: str | None) -> tuple[str, ...]:
    """Split 'fp32,q8' at its commas; keep a mix such as 'vision=q8,decoder=q4' whole."""
    from vlmport.bundle.precisions import split_precisions

    if precision is not None and "=" in precision:
        return (precision,)
    return split_precisions(precision or "")


def check_output(*, stream: bool, as_json: bool) -> None:
    """Raise OptionError where text and JSON are both asked for."""
    if stream and as_json:
        raise OptionError(
            "--stream and --json contradict each other",
            hint="leave one of them out",
            code="option.contradiction",
        )
