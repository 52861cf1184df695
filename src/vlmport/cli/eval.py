"""`vlmport eval`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.bundle.precisions import DEFAULT_PRECISIONS, split_precisions
from vlmport.cli.app import EXIT_FAILED, app
from vlmport.cli.arguments import Device, Threads
from vlmport.cli.console import eval_progress, export_progress, report, say, stdout
from vlmport.cli.json_file import JsonFile, check_writable, write_json
from vlmport.errors import ImageError, OptionError

if TYPE_CHECKING:
    from vlmport.evaluation import Report


@app.command("eval")
def evaluate(
    bundle: Annotated[
        str,
        typer.Argument(
            help="Bundle; a checkpoint, Hub id or built-in name is exported.", metavar="BUNDLE"
        ),
    ],
    pictures: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of pictures with captions; without it, scenes are drawn for models that "
            "were trained on them.",
            metavar="PICTURES",
            show_default=False,
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Captions of the pictures: JSON, JSON lines or CSV; by default captions.json or "
            "metadata.* in their folder.",
            metavar="FILE",
        ),
    ] = None,
    questions: Annotated[
        bool,
        typer.Option(
            "--questions", help="Ask about drawn scenes, for models that were trained on such."
        ),
    ] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="exact-match, rouge-l or cider-d; can be repeated.", metavar="NAME"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            help="Precisions, with commas, or one mix; by default all of the bundle.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many pictures or questions.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures captioned together.", min=1)] = 8,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
    record: Annotated[
        bool, typer.Option(help="Write the figures into the bundle and its model card.")
    ] = True,
) -> None:
    """Measure the captions or answers of a bundle, and what each precision lost to fp32."""
    from vlmport.evaluation import UnrecordedResultError
    from vlmport.evaluation import evaluate as measure
    from vlmport.loading import resolve

    if json_file is not None:
        check_writable(json_file)
    names = _names(precision)

    def keep(result: Report) -> None:
        """What is done is not lost by what comes after it."""
        if json_file is not None:
            with contextlib.suppress(OptionError):  # raised when all is done
                write_json(json_file, result.to_json())

    with export_progress() as exporting:
        wanted = split_precisions([*DEFAULT_PRECISIONS, *(n for n in names if "=" not in n)])
        opened = resolve(bundle, precisions=[n for n in wanted if n != "auto"], progress=exporting)
    unrecorded: UnrecordedResultError | None = None
    with eval_progress() as progress:
        try:
            result = measure(
                opened,
                pictures,
                captions=captions,
                questions=questions,
                metrics=metrics,
                precisions=names or None,
                limit=limit,
                batch_size=batch_size,
                device=device,
                threads=threads,
                record=record,
                console=stdout,
                progress=progress,
                on_precision=keep,
            )
        except UnrecordedResultError as error:
            result, unrecorded = error.report, error
    if json_file is not None:
        write_json(json_file, result.to_json())
    if left_out := len(result.data.left_out):
        say(f"{left_out} pictures of the folder have no captions and were left out")
    for problem in result.unreadable.values():
        report(problem)
    if unrecorded is not None:
        raise unrecorded
    if record:
        say(f"written into {opened.folder}: vlmport.json, README.md")
    if result.unreadable:
        raise typer.Exit(ImageError.exit_code)
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


def _names(precision: str | None) -> tuple[str, ...]:
    """'fp32,q8' → both; a mix such as 'vision=q8,decoder=q4' has commas of its own."""
    if precision is not None and "=" in precision:
        return (precision,)
    return split_precisions(precision or "")
