"""Markdown tables for docs/benchmarks.md from the JSON lines that the benchmarks print last.

    python benchmarks/peers.py | tail -1 >> results.jsonl
    python benchmarks/tables.py results.jsonl

Takes the lines of `vlmport bench`, export.py, peers.py and encode.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADINGS = {
    "image_ms": "image, ms",
    "encode_ms": "encode, ms",
    "prefill_ms": "prefill, ms",
    "decode_tokens_per_s": "decode, tokens/s",
    "request_s": "request, s",
    "python_ms": "Python, ms a token",
    "cold_s": "first caption, s",
    "peak_mb": "peak memory, MB",
    "size_mb": "files, MB",
    "work": "export, s",
    "whole": "process, s",
    "peak": "peak memory, MB",
    "written": "written, MB",
}
IN_BYTES = ("peak", "written")


def table(report: dict[str, Any]) -> list[str]:
    """A row for each engine or precision, a column for each figure."""
    figures: dict[str, dict[str, float]] = report["figures"]
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    rows = [["", *map(_heading, columns)], ["---"] + ["--:"] * len(columns)]
    rows += [[name, *(_cell(row, column) for column in columns)] for name, row in figures.items()]
    if ratios := report.get("ratios"):
        best = [f"{ratios[name]:.2f}x" if name in ratios else "" for name in columns]
        rows.append(["**vlmport : best peer**", *best])
    return [f"| {' | '.join(row)} |" for row in rows]


def _heading(column: str) -> str:
    name, _, length = column.partition("@")
    return HEADINGS[name] + (f" at {length}" if length else "")


def _cell(row: dict[str, float], column: str) -> str:
    if column not in row:
        return ""
    value = row[column] / 1e6 if column in IN_BYTES else row[column]
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def notes(report: dict[str, Any]) -> list[str]:
    """What it ran on, and what was left out."""
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items() if one)
    lines = [
        f"{machine['cpu']} ({', '.join(machine['instructions'])}), {machine['cores']} cores, "
        f"threads: {machine['threads']}, load {machine.get('load', 'unknown')}; Python "
        f"{machine['python']}, {versions}. Medians of {settings['rounds']} rounds."
    ]
    for what, cosines in report.get("cosines", {}).items():
        named = ", ".join(f"{name} {value:.4f}" for name, value in cosines.items())
        if named:
            lines.append(f"Cosine of the logits ({what}) with torch's in float32: {named}.")
    left_out = [f"{name} ({reason})" for name, reason in report.get("missing", {}).items()]
    left_out += report.get("notes", [])
    if left_out:
        lines.append(f"Left out: {'; '.join(left_out)}.")
    return lines


def main() -> None:
    for path in sys.argv[1:]:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            report = json.loads(line)
            print(f"\n### {report.get('benchmark', 'vlmport bench')}\n")
            print("\n".join([*table(report), "", *notes(report)]))


if __name__ == "__main__":
    main()
