"""`vlmport eval`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.cli.app import EXIT_FAILED, SectionedCommand, app
from vlmport.cli.arguments import Device, Source, Threads, split_names
from vlmport.cli.console import eval_progress, export_progress, report, say, stdout
from vlmport.cli.json_file import JsonFile, check_writable, write_json
from vlmport.errors import ImageError, OptionError

if TYPE_CHECKING:
    from vlmport.evaluation import Report


Images = Annotated[
    Path | None,
    typer.Argument(
        help="Folder of images with reference captions. Without it, the scenes of shapes that "
        "vlmport draws are used, for models that were trained on them.",
        metavar="IMAGES",
        show_default=False,
    ),
]
Captions = Annotated[
    Path | None,
    typer.Option(
        help="File of the reference captions: JSON, JSON lines or CSV (default: captions.json or "
        "metadata.* in the folder).",
        metavar="FILE",
    ),
]
Questions = Annotated[
    bool,
    typer.Option("--questions", help="Measure answers about drawn scenes instead of captions."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="exact-match, rouge-l or cider-d; can be repeated (default: rouge-l, for drawn "
        "scenes exact-match).",
        metavar="NAME",
    ),
]
Precisions = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        help="Precisions, separated by commas, or one mix (default: all of the bundle).",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Maximum number of images or questions.", min=1)]
BatchSize = Annotated[
    int, typer.Option(help="Number of images that are captioned together.", min=1)
]
Record = Annotated[bool, typer.Option(help="Write the figures into the bundle and its model card.")]


@app.command("eval", cls=SectionedCommand)
def evaluate(
    bundle: Source,
    images: Images = None,
    captions: Captions = None,
    questions: Questions = False,
    metrics: Metrics = None,
    precision: Precisions = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    json_file: JsonFile = None,
    record: Record = True,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Measure captions or answers.

    Scores the captions or answers of a bundle at each precision, and compares each score with that
    of fp32. The figures are printed, and recorded in the bundle.
    """
    from vlmport.evaluation import UnrecordedResultError
    from vlmport.evaluation import evaluate as measure
    from vlmport.loading import resolve, to_export

    if json_file is not None:
        check_writable(json_file)
    names = split_names(precision)

    def keep(result: Report) -> None:
        """Write the figures so far: a later precision may fail."""
        if json_file is not None:
            with contextlib.suppress(OptionError):  # raised when all is done
                write_json(json_file, result.to_json())

    with export_progress() as exporting:
        opened = resolve(bundle, precisions=to_export(names), progress=exporting)
    unrecorded: UnrecordedResultError | None = None
    with eval_progress() as progress:
        try:
            result = measure(
                opened,
                images,
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
        say(f"{left_out} images of the folder have no captions and are left out")
    for problem in result.unreadable.values():
        report(problem)
    if unrecorded is not None:
        raise unrecorded
    if record:
        say(f"result written into {opened.folder}: vlmport.json, README.md")
    if result.unreadable:
        raise typer.Exit(ImageError.exit_code)
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)
