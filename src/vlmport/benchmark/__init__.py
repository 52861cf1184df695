"""Measure how fast a bundle is on this machine, and the memory it takes: `vlmport bench`.

    report = bench("bundle")
    report.figures["q4"]["decode_tokens_per_s@100"]

docs/benchmarks.md explains each figure.
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
from vlmport.runtime.engines.trust import trust

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
    """The figures of a bundle.

    Attributes:
        bundle: its name.
        machine, settings: what was measured on, and how.
        figures: precision → figure → median. Names of figures of n tokens end in '@n'.
        notes: lengths that were left out, and why.
    """

    bundle: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Format the table: a row for each figure, a column for each precision."""
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
        """The report as a dict for JSON."""
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
    device: str = "cpu",
    cold: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measure how fast a bundle is on this machine, all its precisions in turn.

    Args:
        bundle: a bundle, or its folder.
        precisions: names, 'auto' or mixes such as 'vision=q8,decoder=q4'; None for 'auto' and all
            of the bundle.
        lengths: numbers of tokens of the prompts. Those that do not fit into the model's context
            are left out, and `notes` says so.
        rounds: number of rounds; each gives every figure once, and medians are reported.
        new_tokens: number of tokens to decode after each prompt.
        threads: number of threads of ONNX Runtime; None for one per core.
        device: 'cpu' (default), or engines as `load` takes them, such as 'vision=openvino:bf16'.
        cold: also start a process for each precision, which gives the seconds to the first caption
            and the memory.
        progress: called with (done steps, all steps, what is being measured).

    Returns:
        The report.

    Raises:
        BundleError: the bundle is damaged, or lacks a precision.
        DeviceError: a device is not available here, or computes a component wrongly.
        OptionError: a number is out of its range.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    rounds = whole_number("rounds", rounds, 1)
    new_tokens = whole_number("new_tokens", new_tokens, 2)
    fitting, notes = _fitting(opened, lengths, new_tokens)
    names = list(dict.fromkeys(precisions or _all_precisions(opened)))
    # Open all first: an error comes before minutes of work.
    components = {
        name: TimedComponents.open(opened, precision=name, device=device, threads=threads)
        for name in names
    }
    for one in components.values():
        trust(one)
    steps = Steps(progress)
    figures = _medians(components, fitting, new_tokens, rounds, steps, later=cold * len(names))
    for name in names:
        if cold:
            start = functools.partial(_cold, opened, name, threads, device)
            figures[name] |= _step(steps, f"{name}, cold", start)()
        figures[name]["size_mb"] = _size(opened, components[name]) / 1e6
    settings = {
        "rounds": rounds,
        "new_tokens": new_tokens,
        "picture": [WIDTH, HEIGHT],
        "cold_tokens": COLD_TOKENS,
        "engines": {name: one.device for name, one in components.items()},
    }
    return Report(opened.manifest.name, describe_machine(threads), settings, figures, notes)


def _fitting(
    bundle: Bundle, lengths: Sequence[int], new_tokens: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Sort the lengths that fit into the context from those that do not, with a note for each."""
    wanted = sorted({whole_number("lengths", length, 1) for length in lengths})
    context = bundle.manifest.dims.context_length
    fitting = tuple(length for length in wanted if length + new_tokens <= context)
    notes = tuple(
        f"{length} tokens and {new_tokens} more are past the model's context of {context}"
        for length in wanted
        if length not in fitting
    )
    return fitting, notes


def _medians(
    components: Mapping[str, TimedComponents],
    lengths: Sequence[int],
    new_tokens: int,
    rounds: int,
    steps: Steps,
    *,
    later: int,
) -> dict[str, dict[str, float]]:
    """Measure each figure of each precision in turn, `rounds` times: precision → figure → median.

    Args:
        later: number of steps that follow, for the progress.
    """
    benches = {}
    for name, one in components.items():
        steps.say(f"opening {name}")
        benches[name] = Bench(one, gradient(), lengths, new_tokens)
    calls = {
        (name, figure): _step(steps, f"{figure} of {name}", one.measures[figure])
        for figure in next(iter(benches.values())).measures
        for name, one in benches.items()
    }
    steps.total = (1 + rounds) * len(calls) + later
    interleaved(calls, 1)  # the first round is slower, and not counted
    figures: dict[str, dict[str, float]] = {name: {} for name in components}
    for (name, figure), values in interleaved(calls, rounds).items():
        figures[name][figure] = round(median(values), 4)
    for one in benches.values():
        one.vlm.close()
    return figures


def _all_precisions(bundle: Bundle) -> tuple[str, ...]:
    """List the precisions of the bundle, and first 'auto' where it is a mix of them."""
    choose, whole = bundle.manifest.choose, bundle.manifest.precisions
    auto = choose("auto")
    return whole if any(choose(name) == auto for name in whole) else ("auto", *whole)


class Steps:
    """A count of the steps that are done, for the progress."""

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


def _cold(bundle: Bundle, precision: str, threads: int | None, device: str) -> dict[str, float]:
    """Measure the seconds from the start of Python to a caption, and the peak memory.

    The system may have the files in its cache: Python, ONNX Runtime and the graphs start cold.
    """
    numbers = (threads or 0, WIDTH, HEIGHT, COLD_TOKENS)
    command = [sys.executable, "-m", "vlmport.benchmark.cold", str(bundle.folder), precision]
    command.append(device)
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
            f"{precision}: a caption in a new process failed: {said}",
            hint="try `vlmport caption`; check that a second copy of the model fits into memory",
            code="benchmark.process-failed",
        ) from error
    seconds = time.perf_counter() - start
    peak = json.loads(done.stdout)["peak_bytes"]
    return {"cold_s": seconds} | ({} if peak is None else {"peak_mb": peak / 1e6})


def _size(bundle: Bundle, components: TimedComponents) -> int:
    """Add up the sizes in bytes of the files that this precision needs."""
    files = bundle.manifest.files
    return sum(files[name].size for name in bundle.manifest.files_of(components.choice))
