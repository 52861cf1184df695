"""How fast a bundle is on this machine, and what it takes: `vlmport bench`.

    report = bench("bundle")
    report.figures["q4"]["decode_tokens_per_s@100"]

docs/benchmarks.md says what each figure is.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlmport.benchmark.machine import describe_machine, interleaved, median
from vlmport.benchmark.measure import Bench, TimedComponents
from vlmport.benchmark.picture import HEIGHT, WIDTH, gradient
from vlmport.bundle import Bundle
from vlmport.errors import BundleError
from vlmport.runtime.decoding.options import whole_number

__all__ = ["Progress", "Report", "bench"]

LENGTHS = (100, 1100)
ROUNDS, NEW_TOKENS, COLD_TOKENS = 5, 32, 16
COLD_SECONDS = 600  # a cold caption that takes longer has hung

Made = TypeVar("Made")
# done steps, all steps, what is being measured
Progress = Callable[[int, int, str], None]

# Figure → (heading, digits after the point)
FIGURES = {
    "image_ms": ("image, ms", 2),
    "encode_ms": ("encode, ms", 1),
    "prefill_ms": ("prefill, ms", 1),
    "decode_tokens_per_s": ("decode, tokens/s", 1),
    "python_ms": ("Python, ms a token", 3),
    "cold_s": ("first caption, s", 2),
    "peak_mb": ("peak memory, MB", 0),
    "size_mb": ("files, MB", 1),
}


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        machine, settings: on what, and how.
        figures: precision → figure → median; '@n' ends the figures of n tokens.
        notes: what was left out, and why.
    """

    bundle: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The table: a row for each figure, a column for each precision, as wide as need be."""
        rows = [["", *self.figures]]
        for name in next(iter(self.figures.values()), {}):
            kind, _, length = name.partition("@")
            heading, digits = FIGURES[kind]
            heading += f" at {length}" if length else ""
            rows.append([heading, *(f"{one[name]:.{digits}f}" for one in self.figures.values())])
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        return [
            f"{row[0]:<{first}}"
            + "".join(f"{cell:>{n + 2}}" for cell, n in zip(row[1:], widths, strict=True))
            for row in rows
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "figures": {precision: dict(values) for precision, values in self.figures.items()},
            "notes": list(self.notes),
        }


def bench(
    bundle: Bundle | str | Path,
    *,
    precisions: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = ROUNDS,
    new_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    cold: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measure a bundle on this machine's CPU, its precisions in turn.

    Args:
        precisions: names, 'auto' or mixes such as 'vision=q8,decoder=q4'; None for 'auto' and all
            that the whole bundle exists in.
        lengths: tokens of the prompts; those that the model's context has no room for are left out
            with a note.
        rounds: each gives every figure once; medians are reported.
        new_tokens: decoded at each length.
        threads: of ONNX Runtime; None for one per core.
        cold: also start a process for each precision, for the time to a first caption and memory.

    Raises BundleError for a bad bundle or a precision that it lacks, OptionError for a number out
    of its range.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    rounds, new_tokens = (
        whole_number("rounds", rounds, 1),
        whole_number("new_tokens", new_tokens, 2),
    )
    wanted = sorted({whole_number("lengths", length, 1) for length in lengths})
    names = list(dict.fromkeys(precisions or _all_precisions(opened)))
    context = opened.manifest.dims.context_length
    fitting = tuple(length for length in wanted if length + new_tokens <= context)
    notes = tuple(
        f"{length} tokens and {new_tokens} more are past the model's context of {context}"
        for length in wanted
        if length not in fitting
    )
    # All are opened first, so that what is wrong is said before minutes of work.
    components = {
        name: TimedComponents.open(opened, precision=name, threads=threads) for name in names
    }
    benches = {}
    steps = Steps(progress)
    for name, one in components.items():
        steps.say(f"opening {name}")
        benches[name] = Bench(one, gradient(), fitting, new_tokens)
    calls = {
        (name, figure): _step(steps, f"{figure} of {name}", call)
        for figure in next(iter(benches.values())).measures
        for name, call in ((name, one.measures[figure]) for name, one in benches.items())
    }
    steps.total = (1 + rounds) * len(calls) + cold * len(names)
    interleaved(calls, 1)  # the first round is slower, and not counted
    figures: dict[str, dict[str, float]] = {name: {} for name in names}
    for (name, figure), values in interleaved(calls, rounds).items():
        figures[name][figure] = round(median(values), 4)
    for one in benches.values():
        one.vlm.close()
    for name in names:
        if cold:
            start = functools.partial(_cold, opened, name, threads)
            figures[name] |= _step(steps, f"{name}, cold", start)()
        figures[name]["size_mb"] = _size(opened, components[name]) / 1e6
    return Report(
        opened.manifest.name,
        describe_machine(threads),
        {
            "rounds": rounds,
            "new_tokens": new_tokens,
            "picture": [WIDTH, HEIGHT],
            "cold_tokens": COLD_TOKENS,
        },
        figures,
        notes,
    )


def _all_precisions(bundle: Bundle) -> tuple[str, ...]:
    """All that the whole bundle exists in, and first 'auto' where it is a mix of them."""
    choose, whole = bundle.manifest.choose, bundle.manifest.precisions
    auto = choose("auto")
    return whole if any(choose(name) == auto for name in whole) else ("auto", *whole)


class Steps:
    """Counts what is done."""

    def __init__(self, progress: Progress | None):
        self.progress, self.done, self.total = progress, 0, 0

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _step(steps: Steps, what: str, work: Callable[[], Made]) -> Callable[[], Made]:
    def run() -> Made:
        steps.say(what)
        made = work()
        steps.done += 1
        steps.say(what)
        return made

    return run


def _cold(bundle: Bundle, precision: str, threads: int | None) -> dict[str, float]:
    """Seconds from starting Python to the end of a caption, and that process's peak memory.

    The system may still hold the files: it is Python, ONNX Runtime and the graphs that are cold.
    """
    numbers = (threads or 0, WIDTH, HEIGHT, COLD_TOKENS)
    command = [sys.executable, "-m", "vlmport.benchmark.cold", str(bundle.folder), precision]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *map(str, numbers)],
            capture_output=True,
            text=True,
            check=True,
            timeout=COLD_SECONDS,
        )
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().rpartition("\n")[2]
        raise BundleError(
            f"{precision}: a caption in a process of its own failed: {said}",
            hint="does `vlmport caption` work? is there memory for a second copy of the model?",
            code="benchmark.process-failed",
        ) from error
    seconds = time.perf_counter() - start
    peak = json.loads(done.stdout)["peak_bytes"]
    return {"cold_s": seconds} | ({} if peak is None else {"peak_mb": peak / 1e6})


def _size(bundle: Bundle, components: TimedComponents) -> int:
    """Bytes of the files that this precision needs."""
    files = bundle.manifest.files
    return sum(files[name].size for name in bundle.manifest.files_of(components.choice))
