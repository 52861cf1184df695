"""The result of an evaluation: a table for people, JSON for programs, Markdown for the card."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vlmport.bundle.precisions import SUFFIXES
from vlmport.errors import VlmportError
from vlmport.evaluation.caption_scores import METRICS, Metric
from vlmport.evaluation.examples import ExampleSet

REFERENCE = "fp32"
# Points that a precision may lose to fp32. fp16 rounds less than q8 does; q4f16 rounds like q4.
LIMITS = {"fp16": 1.0, "q8": 1.0, "q4": 3.0, "q4f16": 3.0}

Figures = Mapping[str, Mapping[str, float]]  # precision → metric → points


@dataclass(frozen=True)
class Answers:
    """The captions or answers of one precision, with their scores.

    Attributes:
        captions: one for each example; None where the image could not be read.
        scores: metric → a score for each caption; None as above.
    """

    captions: tuple[str | None, ...]
    scores: Mapping[str, tuple[float | None, ...]]

    def points(self, metric: str) -> float:
        """Return the mean over the images that were read, times 100, to two decimals."""
        scores = [score for score in self.scores[metric] if score is not None]
        return round(100 * sum(scores) / len(scores), 2)


@dataclass(frozen=True, repr=False)
class Report:
    """One run over a set of examples.

    Attributes:
        answers: precision (or mix) → its captions or answers, in the order of the run.
        unreadable: image → the error that left it out.
        limits: precision → points that it may lose to fp32.
        programs: names and versions of the programs of this run.
        recorded: figures of an earlier run over the same examples on the same device, for the
            precisions that this run leaves out.
        recorded_by: the programs of that run.
    """

    data: ExampleSet
    metrics: tuple[Metric, ...]
    device: str
    programs: tuple[str, ...]
    answers: Mapping[str, Answers]
    unreadable: Mapping[str, VlmportError]
    limits: Mapping[str, float]
    recorded: Figures = field(default_factory=dict)
    recorded_by: str = ""

    def __repr__(self) -> str:
        figures = "; ".join(
            f"{precision} {', '.join(f'{name} {points:.2f}' for name, points in one.items())}"
            for precision, one in self.figures.items()
        )
        verdict = "passed" if self.passed else "failed"
        return f"Report({verdict}: {self.data.name}, {counted(self.entry())}: {figures})"

    def _repr_html_(self) -> str:
        """Show the figures in a notebook, with every loss past its limit."""
        heads = ("precision", *(metric.title for metric in self.metrics), "to fp32", "may lose")
        names = [metric.name for metric in self.metrics]
        rows = [
            (precision, *(_points(one, name) for name in names), *self._judged(precision))
            for precision, one in self.figures.items()
        ]
        broken = "".join(f"<p><b>{html.escape(str(one))}</b></p>" for one in self._broken)
        title = html.escape(f"{self.data.name}, {counted(self.entry())}, {self.device}")
        table = _html_row("th", heads) + "".join(_html_row("td", row) for row in rows)
        return f"<p>{title}</p><table>{table}</table>{broken}"

    @property
    def measured(self) -> Figures:
        """The figures of this run."""
        return {
            precision: {metric.name: answers.points(metric.name) for metric in self.metrics}
            for precision, answers in self.answers.items()
        }

    @property
    def figures(self) -> Figures:
        """The figures of this run, completed by recorded ones; fp32 is first."""
        names = [*self.answers, *self.recorded]
        known = [name for name in SUFFIXES if name in names]
        ordered = dict.fromkeys([*known, *names])
        measured = self.measured
        return {n: {**self.recorded.get(n, {}), **measured.get(n, {})} for n in ordered}

    @property
    def by(self) -> str:
        """The programs that measured the figures, including the recorded ones."""
        kept = self.figures != self.measured
        earlier = self.recorded_by.split(", ") if kept and self.recorded_by else []
        return ", ".join(dict.fromkeys([*self.programs, *earlier]))

    @property
    def losses(self) -> list[Loss]:
        """The loss of each measured precision to fp32, where that has a limit."""
        return [one for one in losses(self.figures, self.limits) if one.precision in self.answers]

    @property
    def _broken(self) -> list[Loss]:
        """The losses that are past their limits."""
        return [loss for loss in self.losses if not loss.passed]

    @property
    def passed(self) -> bool:
        """Whether no precision lost more than its limit; a missing fp32 is no loss."""
        return all(loss.passed for loss in self.losses)

    @property
    def pictures(self) -> int:
        """Number of images that were shown and could be read."""
        return sum(len(one.sources) for one in self.data.examples) - len(self.unreadable)

    def entry(self) -> dict[str, Any]:
        """Return this run's entry of `accuracy` in vlmport.json."""
        return {
            "data": self.data.name,
            "pictures": self.pictures,
            **({"questions": len(self.data)} if self.data.asks else {}),
            "sha256": self.data.sha256,
            "device": self.device,
            "by": self.by,
            "passed": all(loss.passed for loss in losses(self.figures, self.limits)),
            "figures": self.figures,
            "limits": dict(self.limits),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the figures, and every example with all captions or answers."""
        return {
            **self.entry(),
            "figures": self.measured,
            "passed": self.passed,
            "losses": [loss.to_json() for loss in self.losses],
            "unreadable": {name: one.to_json() for name, one in self.unreadable.items()},
            "left_out": list(self.data.left_out),
            "examples": [self._example(number) for number in range(len(self.data))],
        }

    def _example(self, number: int) -> dict[str, Any]:
        example = self.data.examples[number]
        return {
            "picture": example.name,
            **({} if example.question is None else {"question": example.question}),
            "references": list(example.references),
            "captions": {name: one.captions[number] for name, one in self.answers.items()},
            "scores": {
                name: {metric: scores[number] for metric, scores in one.scores.items()}
                for name, one in self.answers.items()
            },
        }

    def print(self, console: Console) -> None:
        """Print a row for each precision, and below the table every loss past its limit."""
        title = escape(f"{self.data.name}, {counted(self.entry())}, {self.device}")
        heads = [metric.title for metric in self.metrics]
        figures = (Column(head, justify="right") for head in (*heads, "to fp32", "may lose"))
        table = Table("precision", *figures, title=title, title_justify="left")
        for precision, figures in self.figures.items():
            if precision not in self.answers and precision != REFERENCE:
                continue
            mark = "" if precision in self.answers else " (recorded)"
            points = [_points(figures, metric.name) for metric in self.metrics]
            table.add_row(precision + mark, *points, *self._judged(precision))
        console.print(table)
        if self.losses and self.passed:
            console.print("passed: none lost more than it may", style="green")
        for loss in self._broken:
            console.print(f"broken: {loss}", style="red", markup=False, highlight=False)
        for note in (self._too_few(), self._not_compared()):
            if note is not None:
                console.print(note, markup=False, highlight=False)

    def _judged(self, precision: str) -> tuple[str, str]:
        """Fill the two columns that compare: points gained or lost, and the limit."""
        mine = [loss for loss in self.losses if loss.precision == precision]
        return ", ".join(f"{0.0 - one.points:+.2f}" for one in mine), ", ".join(
            f"{one.limit:g}" for one in mine[:1]
        )

    def _too_few(self) -> str | None:
        """Note that one example counts for more points than a limit."""
        limit = min((loss.limit for loss in self.losses), default=None)
        one = 100 / len(self.data)
        if limit is None or one <= limit:
            return None
        return f"one of {len(self.data)} is {one:.3g} points, and a limit {limit:g}: take more"

    def _not_compared(self) -> str | None:
        """Note why rounded precisions were not compared with fp32, if they were not."""
        rounded = [name for name in self.answers if name in self.limits]
        if not rounded or self.losses:
            return None
        if REFERENCE in self.figures:
            return "nothing was compared with fp32: a loss of CIDEr-D has no limit"
        return f"{REFERENCE} was not measured, so nothing was compared with it"


@dataclass(frozen=True)
class Loss:
    """The cost of rounding: points of fp32 minus points of the precision; below 0 is a gain."""

    precision: str
    metric: str
    points: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.points <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "metric": self.metric,
            "points": self.points,
            "limit": self.limit,
            "passed": self.passed,
        }

    def __str__(self) -> str:
        return (
            f"{self.precision} loses {self.points:g} points of {METRICS[self.metric].name} to "
            f"{REFERENCE}, it may lose {self.limit:g}"
        )


def losses(figures: Figures, limits: Mapping[str, float]) -> list[Loss]:
    """Compute the loss to fp32 of each precision with a limit, by each metric that is a share."""
    return [
        Loss(precision, name, round(figures[REFERENCE][name] - points, 2), limits[precision])
        for precision, one in figures.items()
        for name, points in one.items()
        if precision in limits
        and name in METRICS
        and METRICS[name].judged
        and name in figures.get(REFERENCE, {})
    ]


def limit_of(precisions: Iterable[str]) -> float | None:
    """Return the limit of a mix, which is that of its coarsest part; None if nothing is rounded."""
    return max((LIMITS[one] for one in precisions if one in LIMITS), default=None)


def accuracy_markdown(accuracy: Sequence[Mapping[str, Any]]) -> str:
    """Write the model card's section from vlmport.json's `accuracy`: a table for each data set."""
    return "\n\n".join(_table(entry) for entry in accuracy)


def counted(entry: Mapping[str, Any]) -> str:
    """Count the examples: '1,000 images', or '1,000 questions about 1,250 images'."""
    asked = f"{entry['questions']:,} questions about " if "questions" in entry else ""
    return f"{asked}{entry['pictures']:,} images"


def title_of(metric: str) -> str:
    """Return a metric's title, 'exact match %'; a metric of another version keeps its name."""
    return METRICS[metric].title if metric in METRICS else metric


def _table(entry: Mapping[str, Any]) -> str:
    figures, limits = entry["figures"], entry["limits"]
    names = list(dict.fromkeys(name for one in figures.values() for name in one))
    heads = [title_of(name) for name in names]
    data = html.escape(entry["data"]).replace("|", "&#124;")
    lines = [
        f"`vlmport eval` on {data}, {counted(entry)}, by {entry['by']} on {entry['device']}. Each "
        f"figure is the mean over the {'questions' if 'questions' in entry else 'images'}, times "
        "100.",
        "",
        "| precision | " + " | ".join(heads) + " | may lose to fp32 |",
        "| --- |" + " ---: |" * len(heads) + " ---: |",
    ]
    broken = {one.precision for one in losses(figures, limits) if not one.passed}
    for precision, points in figures.items():
        cells = [_points(points, name) for name in names]
        limit = f"{limits[precision]:g}" if precision in limits else ""
        note = f"**lost more than {limit}**" if precision in broken else limit
        lines.append(f"| `{precision}` | " + " | ".join(cells) + f" | {note} |")
    return "\n".join(lines)


def _html_row(tag: str, cells: Sequence[str]) -> str:
    """Format a row of a table in a notebook."""
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _points(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.2f}" if name in figures else "-"
