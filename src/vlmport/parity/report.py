"""The result of verify: rows, a table for people, JSON for programs, Markdown for the card."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vlmport.parity.limits import Limit
from vlmport.parity.rungs import CAUSES, ORDER, ROUNDED, WEIGHTS_RUNG

NOTHING = "nothing was compared, both sides refuse every request"
# Codes of a row that failed; a row where the bundle raised a VlmportError has that error's code.
PAST_LIMIT = "past-limit"
GRAPH_FAILS = "graph-fails"  # ONNX Runtime raised an error
ONLY_BUNDLE_ANSWERS = "only-bundle-answers"  # to a request that the reference refuses
RUNG_WIDTH, CELL_WIDTH = 19, 28  # of the printed table's columns, at least; lines among them


@dataclass(frozen=True)
class Measure:
    """One number of a rung, and its limit."""

    name: str
    value: float
    limit: Limit

    @property
    def passed(self) -> bool:
        return self.limit.holds(self.value)

    def __str__(self) -> str:
        return shown(self.name, self.value, self.limit.to_json())


@dataclass(frozen=True)
class Row:
    """One rung for one request at one precision.

    Attributes:
        image: the name of the request, which is that of its image where it has one.
        error: the error that the bundle's side raised; then there are no measures.
        code: a stable name of this error.
        detail: a note for the reader, such as the two margins where tokens differ.
    """

    image: str
    precision: str
    rung: str
    measures: tuple[Measure, ...]
    error: str | None = None
    detail: str | None = None
    code: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and not self.past_limit

    @property
    def past_limit(self) -> tuple[Measure, ...]:
        """The measures that are not within their limits."""
        return tuple(one for one in self.measures if not one.passed)

    def to_json(self) -> dict[str, Any]:
        row = {
            "image": self.image,
            "precision": self.precision,
            "rung": self.rung,
            "passed": self.passed,
            "measures": {one.name: _json_number(one.value) for one in self.measures},
        }
        notes = {"code": self.code or (PAST_LIMIT if self.past_limit else None)}
        notes |= {"error": self.error, "detail": self.detail}
        row |= {name: text for name, text in notes.items() if text is not None}
        if self.past_limit:
            row["past_limit"] = {
                one.name: {"value": _json_number(one.value), **one.limit.to_json()}
                for one in self.past_limit
            }
        return row

    def describe(self) -> str:
        """Return one line: rung, precision, request, numbers past their limits, and the detail."""
        wrong = [str(one) for one in self.past_limit]
        what = "; ".join([*wrong, *(text for text in (self.error, self.detail) if text)])
        return f"{self.rung}, {self.precision}, {self.image}: {what}"


@dataclass(frozen=True, repr=False)
class Report:
    """All rows of one run.

    Attributes:
        reference: names and versions of the programs on the reference's side.
    """

    reference: str
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return f"Report({self.summary})"

    def _repr_html_(self) -> str:
        """Show the verdict and the table of rungs in a notebook."""
        parity = self.to_json()
        precisions = _names(parity["rows"], "precision")
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("rung", *precisions))
        body = "".join(
            f"<tr><td>{html.escape(rung)}</td>{''.join(_html_cell(*cell) for cell in cells)}</tr>"
            for rung, cells in _cells(parity, precisions)
        )
        return f"<p>{html.escape(self.summary)}</p><table><tr>{head}</tr>{body}</table>"

    @property
    def passed(self) -> bool:
        """Whether every row passed; both sides may refuse some requests, but not all."""
        measured = any(row.measures and row.rung != WEIGHTS_RUNG for row in self.rows)
        return measured and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed, in the order of the rungs; the first has the cause."""
        failed = [row for row in self.rows if not row.passed]
        return tuple(sorted(failed, key=lambda row: ORDER.index(row.rung)))

    @property
    def first_broken(self) -> Row | None:
        """The failure on the lowest rung; what fails above it may be its consequence."""
        return next(iter(self.failures), None)

    @property
    def likely_cause(self) -> str | None:
        """The place to look at first; None where all passed."""
        if self.first_broken is None:
            return None
        exact = [row.passed for row in self.rows if row.precision == "fp32"]
        rung = self.first_broken.rung
        nature = exact and all(exact) and rung != WEIGHTS_RUNG
        return (f"{ROUNDED}; otherwise " if nature else "") + CAUSES[rung]

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if self.passed:
            return f"all {len(self.rows)} checks passed against {self.reference}"
        if self.first_broken is None:
            return NOTHING
        return (
            f"{len(self.failures)} of {len(self.rows)} checks failed; first broken: "
            f"{self.first_broken.describe()}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return `parity` of vlmport.json, with limits by precision, rung and measure."""
        limits: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            known = limits.setdefault(row.precision, {}).setdefault(row.rung, {})
            known |= {measure.name: measure.limit.to_json() for measure in row.measures}
        return {
            "reference": self.reference,
            "passed": self.passed,
            "limits": limits,
            "rows": [row.to_json() for row in self.rows],
        }

    def print(self, console: Console) -> None:
        """Print the worst numbers of each rung, the verdict, every failure, and the likely cause.

        The table has as many precisions side by side as the console has room for.
        """
        parity = self.to_json()
        precisions = _names(parity["rows"], "precision")
        console.print(f"against {self.reference}", markup=False, highlight=False)
        for some in _batched(precisions, max(1, (console.width - RUNG_WIDTH) // CELL_WIDTH)):
            table = Table(Column("rung", no_wrap=True), *some)
            for rung, cells in _cells(parity, some):
                table.add_row(rung, *(_coloured(*cell) for cell in cells))
            console.print(table)
        count, failed = len(self.rows), len(self.failures)
        if self.passed:
            console.print(f"passed: all {count} checks", style="green", highlight=False)
        elif not failed:
            console.print(f"failed: {NOTHING}", style="red", highlight=False)
        else:
            console.print(f"failed: {failed} of {count} checks", style="red", highlight=False)
        for row in self.failures:
            console.print(f"[red]broken[/] {escape(row.describe())}", highlight=False)
        if self.likely_cause is not None:
            console.print(f"likely cause: {escape(self.likely_cause)}", highlight=False)


def parity_markdown(parity: Mapping[str, Any]) -> str:
    """Write the model card's section from vlmport.json's `parity`: the inputs and a table.

    Each cell has the worst number of all inputs; the rung of weights has components instead.
    """
    rows = parity["rows"]
    precisions = _names(rows, "precision")
    inputs = _names([row for row in rows if row["rung"] != WEIGHTS_RUNG], "image")
    lines = [
        f"`vlmport verify` against {parity['reference']}, on {len(inputs)} inputs "
        f"({', '.join(inputs)}): **{'passed' if parity['passed'] else 'failed'}**. "
        "Each rung is fed the reference's result of the rung before; the numbers are the worst "
        "of all inputs. std is the standard deviation of the reference's values.",
        "",
        "| rung | " + " | ".join(precisions) + " |",
        "| --- |" + " --- |" * len(precisions),
    ]
    for rung, cells in _cells(parity, precisions):
        shown = [text if passed else f"**failed**: {text}" for passed, text in cells]
        lines.append(f"| {rung} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _names(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """List the different values of a key, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def _cells(
    parity: Mapping[str, Any], precisions: Sequence[str]
) -> list[tuple[str, list[tuple[bool, str]]]]:
    """List each rung with, for each precision, whether it passed and its worst numbers."""

    def cell(rung: str, precision: str) -> tuple[bool, str]:
        chosen = [
            row for row in parity["rows"] if row["rung"] == rung and row["precision"] == precision
        ]
        limits = parity["limits"].get(precision, {}).get(rung, {})
        return all(row["passed"] for row in chosen), _worst(chosen, limits)

    found = _names(parity["rows"], "rung")
    rungs = sorted(found, key=ORDER.index) if set(found) <= set(ORDER) else found
    return [(rung, [cell(rung, precision) for precision in precisions]) for rung in rungs]


def _worst(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> str:
    """Format the worst value of each measure; NaN is worse than any number."""
    if not rows:
        return "-"
    if any("error" in row for row in rows):
        return "error"
    rows = [row for row in rows if row["measures"]]  # the others are what both sides refuse
    if not rows:
        return "both refuse"
    texts = []
    for name, limit in limits.items():
        values = [row["measures"][name] for row in rows]
        worst = min if limit["at_least"] else max
        value = None if None in values else worst(values)
        texts.append(shown(name, value, limit))
    return ", ".join(texts)


def shown(name: str, value: float | None, limit: Mapping[str, Any]) -> str:
    """Format a measure: 'worst 3.1e-06 std (≤ 0.0001)', or '0 wrong ids' where the limit is 0."""
    number = "not finite" if value is None or not math.isfinite(value) else f"{value:.3g}"
    if limit["limit"] == 0 and not limit["at_least"]:
        return f"{number} wrong {limit['unit']}"
    sign = "≥" if limit["at_least"] else "≤"
    unit = f" {limit['unit']}" if limit["unit"] else ""
    return f"{name} {number}{unit} ({sign} {limit['limit']:g})"


def _html_cell(passed: bool, text: str) -> str:
    """Format a cell of the table in a notebook: a failure is bold."""
    text = html.escape(text)
    return f"<td>{text}</td>" if passed else f"<td><b>failed: {text}</b></td>"


def _json_number(value: float) -> float | None:
    """Round to four digits; JSON has no infinity, so numbers that are not finite become null."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _batched(names: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """Split names into groups of `count`."""
    for start in range(0, len(names), count):
        yield names[start : start + count]


def _coloured(passed: bool, text: str) -> str:
    lines = escape(text).replace(", ", "\n")
    return f"[{'green' if passed else 'red'}]{lines}[/]"
