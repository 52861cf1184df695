"""Measure how good a bundle's captions or answers are at each precision, and the cost of rounding.

    report = evaluate("bundle")                      # the held-out scenes of `shapes`
    report = evaluate("bundle", questions=True)      # questions about such scenes
    report = evaluate("bundle", "folder/of/photos")  # with captions.json or metadata.csv in it
    report.figures, report.passed

docs/evaluation.md explains the measurements and the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
from rich.console import Console

from vlmport import __version__
from vlmport.bundle import Bundle
from vlmport.bundle.precisions import ANY
from vlmport.bundle.recording import write_result
from vlmport.errors import BundleError, EvaluationError, ImageError, PromptError, VlmportError
from vlmport.evaluation.caption_scores import Metric, parse_metrics
from vlmport.evaluation.examples import (
    ExampleSet,
    captioned_pictures,
    drawn_questions,
    drawn_scenes,
)
from vlmport.evaluation.report import Answers, Report, accuracy_markdown, limit_of
from vlmport.loading import open_bundle
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.graphs.devices import choose_forms, parse_engines
from vlmport.runtime.model import BATCH_SIZE, VLM, Response

__all__ = ["Progress", "Report", "UnrecordedResultError", "accuracy_markdown", "evaluate"]

# A model that was trained on scenes has one right among its first few; any other never does.
ENOUGH_TO_TELL = 32

# done images, all images of all precisions, what is being measured
Progress = Callable[[int, int, str], None]


class UnrecordedResultError(BundleError):
    """The evaluation is done, but its result can't be, or must not be, written into the bundle.

    Attributes:
        report: the result.
    """

    def __init__(self, message: str, *, report: Report, code: str, hint: str | None = None):
        super().__init__(message, hint=hint, code=code)
        self.report = report


def evaluate(
    bundle: Bundle | str | Path,
    pictures: str | Path | None = None,
    *,
    captions: str | Path | None = None,
    questions: bool = False,
    metrics: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
    threads: int | None = None,
    record: bool = True,
    console: Console | None = None,
    progress: Progress | None = None,
    on_precision: Callable[[Report], None] | None = None,
) -> Report:
    """Measure a bundle's captions or answers at each precision, and what each lost to fp32.

        report = vlmport.evaluate("my-bundle", "photos")  # photos/captions.json is the reference
        report.figures, report.passed

    Args:
        bundle: a bundle, its folder, or a built-in name.
        pictures: a folder of images with reference captions. None (default) draws the 1,000
            held-out scenes that the built-in models are measured on.
        captions: the file of reference captions; None finds captions.json, metadata.csv or
            metadata.jsonl in the folder.
        questions: ask the 1,000 held-out questions about scenes instead (default False), for models
            that were trained on such.
        metrics: names of 'exact_match', 'rouge_l' and 'cider_d'; None is exact_match for scenes and
            rouge_l for a folder.
        precisions: names, 'auto' or mixes such as 'vision=q8,decoder=q4'; None for all of the
            bundle.
        limit: maximum number of images or questions, from the first; None for all.
        batch_size: number of images that are captioned together (default 8); questions are asked
            one by one.
        device: 'cpu' (default), 'cuda', 'vision=openvino:bf16', …, as far as it is installed.
        threads: number of threads of ONNX Runtime; None for one per core.
        record: write the figures into vlmport.json and the model card (default True).
        console: a rich console to print the table to; None prints nothing.
        progress: called with (done images, images of all precisions, what is next).
        on_precision: called with the report so far after each precision.

    Returns:
        The report, whether it passed or not.

    Raises:
        EvaluationError: images or captions that can't be measured on.
        DependencyError: the library of a metric is not installed.
        UnrecordedResultError: the figures are done and printed, but the bundle can't be written, or
            some images could not be read; its `report` has the result.
        BundleError, DeviceError, OptionError: a damaged bundle, an unknown device, a number out of
            its range.
    """
    _check_options(pictures, captions, questions)
    # A bundle that was opened earlier does not know what was recorded since.
    bundle = open_bundle(
        bundle.folder if isinstance(bundle, Bundle) else bundle, precisions=precisions or ()
    )
    whole_number("batch_size", batch_size, 1)
    chosen = parse_metrics(metrics or ["exact_match" if pictures is None else "rouge_l"])
    wanted = list(precisions or bundle.manifest.precisions)
    engines = parse_engines(device, bundle.manifest.components)
    for name in wanted:
        choose_forms(bundle.manifest, name, engines)
    data = _examples(pictures, captions, questions, limit)
    report = _empty(bundle, data, chosen, device)
    for number, name in enumerate(wanted):
        with VLM.open(bundle, precision=name, device=device, threads=threads) as model:
            report = _measured(report, model, batch_size, (number, len(wanted)), progress)
        if on_precision is not None:
            on_precision(report)
    if console is not None:
        report.print(console)
    if record:
        _record(bundle, report)
    return report


def _check_options(
    pictures: str | Path | None, captions: str | Path | None, questions: bool
) -> None:
    """Raise EvaluationError for options that contradict each other."""
    if pictures is None and captions is not None:
        raise EvaluationError(
            f"captions {captions} without images",
            hint="give the folder of images as well: vlmport eval BUNDLE FOLDER --captions FILE",
            code="option.contradiction",
        )
    if pictures is not None and questions:
        raise EvaluationError(
            f"questions about {pictures}: they are about drawn scenes only",
            hint="leave out the images, or the questions",
            code="option.contradiction",
        )


def _examples(
    pictures: str | Path | None, captions: str | Path | None, questions: bool, limit: int | None
) -> ExampleSet:
    """Read the folder of images, or draw scenes or questions about them."""
    if pictures is not None:
        return captioned_pictures(pictures, captions, limit)
    return drawn_questions(limit) if questions else drawn_scenes(limit)


def _empty(bundle: Bundle, data: ExampleSet, metrics: tuple[Metric, ...], device: str) -> Report:
    """Create the report of a run, with the figures that an earlier run recorded for this data."""
    programs = {"vlmport": __version__, "onnxruntime": onnxruntime.__version__}
    for package in (name.replace("_", "-") for metric in metrics for name in metric.modules):
        programs[package] = version(package)
    by = tuple(f"{name} {number}" for name, number in programs.items())
    earlier: Mapping[str, Any] = next(
        (
            entry
            for entry in bundle.manifest.accuracy
            if (entry["sha256"], entry["device"]) == (data.sha256, device)
        ),
        {"figures": {}, "by": ""},
    )
    recorded, before = earlier["figures"], earlier["by"]
    limits = {name: limit for name in recorded if (limit := limit_of(_parts(name))) is not None}
    return Report(data, metrics, device, by, {}, {}, limits, recorded, before)


def _parts(precision: str) -> list[str]:
    """Split a name or a mix into precisions."""
    return [part.rpartition("=")[2] for part in precision.split(",")]


def _measured(
    report: Report,
    model: VLM,
    batch_size: int,
    turn: tuple[int, int],
    progress: Progress | None,
) -> Report:
    """Measure one precision, and add it to the report."""
    data, (number, count) = report.data, turn
    texts: list[str | None] = []
    unreadable = dict(report.unreadable)
    for example, result in zip(data.examples, _said(model, data, batch_size), strict=True):
        if progress is not None:
            progress(number * len(data) + len(texts), count * len(data), model.precision)
        if isinstance(result, VlmportError):
            unreadable[example.name] = result
            texts.append(None)
        else:
            texts.append(result.text.strip())  # many models begin with a space
        if not report.answers and len(texts) == min(ENOUGH_TO_TELL, len(data)):
            _check_it_knows_scenes(data, texts)
    if len(unreadable) == len(data):
        raise EvaluationError(
            f"none of the {len(data)} images can be captioned: {next(iter(unreadable.values()))}",
            hint="check that these files are images",
            code="evaluation.incomplete",
        )
    answers = {**report.answers, model.precision: _scored(data, texts, report.metrics)}
    limit = limit_of(value for value in model.components.choice.values() if value != ANY)
    limits = dict(report.limits) | ({} if limit is None else {model.precision: limit})
    if progress is not None:
        progress((number + 1) * len(data), count * len(data), model.precision)
    return dataclasses.replace(report, answers=answers, unreadable=unreadable, limits=limits)


def _said(
    model: VLM, data: ExampleSet, batch_size: int
) -> Iterator[Response | ImageError | PromptError]:
    """Ask the model about each example, in order.

    Tokens are never sampled, whatever the bundle's defaults are: a figure would differ each time.
    """
    if not data.asks:
        yield from model.caption_each(data.images(), batch_size=batch_size, do_sample=False)
        return
    for example in data.examples:
        parts = [{"type": "image"} for _ in example.sources]
        asked = [*parts, {"type": "text", "text": example.question}]
        yield model.generate([{"role": "user", "content": asked}], example.images, do_sample=False)


def _check_it_knows_scenes(data: ExampleSet, texts: Sequence[str | None]) -> None:
    """Raise EvaluationError for a model that was not trained on scenes: its 0 % means nothing."""
    right = zip(texts, data.examples, strict=False)
    if data.is_drawn and not any(text in example.references for text, example in right):
        what = "answers" if data.asks else "captions"
        raise EvaluationError(
            f"none of the first {len(texts)} {what} is right: without images of your own, eval "
            f"measures on {data.name}, for models trained on such scenes",
            hint="measure on your own images and captions with: vlmport eval BUNDLE FOLDER",
            code="evaluation.not-trained-on-scenes",
        )


def _scored(data: ExampleSet, texts: Sequence[str | None], metrics: Sequence[Metric]) -> Answers:
    """Score the captions; None stays None."""
    read = [number for number, text in enumerate(texts) if text is not None]
    captions = [text for text in texts if text is not None]
    references = [data.examples[number].references for number in read]
    scores: dict[str, tuple[float | None, ...]] = {}
    for metric in metrics:
        one: list[float | None] = [None] * len(texts)
        for number, score in zip(read, metric.score(captions, references), strict=True):
            one[number] = score
        scores[metric.name] = tuple(one)
    return Answers(tuple(texts), scores)


def _record(bundle: Bundle, report: Report) -> None:
    """Write the figures into the bundle, over those of the same data; other data keep theirs."""
    if report.unreadable:
        raise UnrecordedResultError(
            f"{len(report.unreadable)} of {len(report.data)} images could not be captioned, so "
            f"the figures are not of the whole set and are not written into {bundle.folder}",
            hint="fix these images, or remove them from the captions",
            report=report,
            code="evaluation.incomplete",
        )
    entry = report.entry()
    key = (entry["sha256"], entry["device"])
    others = [one for one in bundle.manifest.accuracy if (one["sha256"], one["device"]) != key]
    accuracy = (*others, entry)
    manifest = dataclasses.replace(bundle.manifest, accuracy=accuracy)
    try:
        write_result(bundle, manifest, {"accuracy": accuracy_markdown(accuracy)})
    except OSError as error:
        raise UnrecordedResultError(
            f"{bundle.folder}: the figures can't be written into the bundle: "
            f"{error.strerror or error}",
            hint="check the rights of the folder and the free space, or write them elsewhere: "
            "--json FILE",
            report=report,
            code="bundle.unwritable",
        ) from error
