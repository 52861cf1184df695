"""Test a device with the bundle's golden input before it is trusted.

The exporter records the results of its graphs on its own CPU; a probe runs the same input and
compares.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle, Golden, GoldenExpectation
from vlmport.errors import BundleError
from vlmport.runtime.graphs.base import BundleGraphs
from vlmport.runtime.layouts import LAYOUTS, open_graphs
from vlmport.runtime.layouts.golden import Feeds, GoldenRun, golden_image

if TYPE_CHECKING:
    from jaxtyping import Int64

__all__ = [
    "ProbeReport",
    "check_golden",
    "golden_feeds",
    "golden_image",
    "open_graphs",
    "record_golden",
]

NEW_TOKENS = 16
LOGIT_IDS = 64

# Maximum error of a logit, in standard deviations of the first logits. Quantized graphs round
# activations too, and each device does so differently; the known faults are far larger.
# fp16 stays within 0.003 of fp32 on the golden input (shapes, random weights of 2 and 6 layers).
TOLERANCE = {"fp32": 0.01, "fp16": 0.02}
QUANTIZED_TOLERANCE = 0.3


@dataclass(frozen=True)
class ProbeReport:
    """Whether a device gives the recorded results, and what differs if not.

    Attributes:
        logit_error: the largest difference from a recorded logit.
        near_ties: number of tokens that differ, but whose scores are closer than the tolerance.
    """

    device: str
    precision: str
    problems: tuple[str, ...]
    logit_error: float
    tolerance: float
    near_ties: int
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "as recorded"
        return (
            f"{self.precision} on {self.device}: {verdict} (logits within {self.logit_error:.2g}, "
            f"allowed {self.tolerance:.2g}; {self.seconds:.2f} s)"
        )


def run_golden(graphs: BundleGraphs, golden: Golden, new_tokens: int = NEW_TOKENS) -> GoldenRun:
    """Run the golden input, and generate greedily, past any stop token."""
    return LAYOUTS[graphs.layout].golden_run(graphs, golden, new_tokens)


def golden_feeds(bundle: Bundle, precision: str) -> Feeds:
    """Yield each component that may contain float16, with its inputs for the golden input."""
    graphs = open_graphs(bundle, precision)
    return LAYOUTS[graphs.layout].golden_feeds(graphs, bundle.manifest.golden)


def record_golden(
    graphs: BundleGraphs, golden: Golden, *, tolerance: float | None = None
) -> GoldenExpectation:
    """Run the golden input and record its results.

    Args:
        tolerance: maximum error of a logit; None takes TOLERANCE for the precision.

    Raises BundleError where the graphs themselves are at fault (cache, NaN).
    """
    room = graphs.manifest.dims.context_length - golden.prefill_tokens + 1
    run = run_golden(graphs, golden, max(1, min(NEW_TOKENS, room)))
    first = run.logits[0]
    if faults := [*run.faults, *_not_finite(run)]:
        raise BundleError(
            f"the golden input shows a fault in the graphs: {'; '.join(faults[:3])}",
            hint="please report this",
            code="export.invalid-graph",
        )
    share = TOLERANCE.get(graphs.precision, QUANTIZED_TOLERANCE)
    ids = logit_ids(len(first), run.tokens[0])
    return GoldenExpectation(
        tokens=run.tokens,
        logit_ids=tuple(int(i) for i in ids),
        logits=tuple(float(value) for value in first[ids]),
        tolerance=tolerance or max(1e-4, share * float(first.std())),
    )


def check_golden(
    graphs: BundleGraphs,
    golden: Golden | None = None,
    expected: GoldenExpectation | None = None,
) -> ProbeReport:
    """Run the golden input and compare its results with those recorded for this precision.

    Args:
        golden, expected: by default the manifest's.

    Raises BundleError where nothing was recorded for this precision.
    """
    golden = golden or graphs.manifest.golden
    expected = expected or golden.expected.get(graphs.precision)
    if expected is None:
        raise BundleError(
            f"no golden is recorded for precision {graphs.precision!r}",
            hint=f"probe one of {', '.join(golden.expected) or '(none)'}",
            code="bundle.wrong-golden",
        )
    start = time.perf_counter()
    run = run_golden(graphs, golden, len(expected.tokens))
    seconds = time.perf_counter() - start
    problems = [*run.faults, *_not_finite(run)]
    recorded = dict(zip(expected.logit_ids, expected.logits, strict=False))
    wanted = {i: value for i, value in recorded.items() if i < run.logits.shape[1]}
    if len(wanted) < len(expected.logit_ids):
        problems.append(
            f"{len(wanted)} of {len(expected.logit_ids)} recorded logits can be compared: the "
            f"vocabulary has {run.logits.shape[1]} entries, recorded were {len(expected.logits)}"
        )
    difference = run.logits[0, list(wanted)] - np.array(list(wanted.values()), np.float32)
    error = float(np.abs(difference).max(initial=0.0))
    if not error <= expected.tolerance:
        problems.append(f"first logits are off by {error:.3g}, allowed {expected.tolerance:.3g}")
    near_ties, other_tokens = _compare_tokens(run, expected)
    problems += other_tokens
    return ProbeReport(
        graphs.device,
        graphs.precision,
        tuple(problems),
        error,
        expected.tolerance,
        near_ties,
        seconds,
    )


def logit_ids(vocab_size: int, best: int) -> Int64[np.ndarray, " n"]:
    """Choose LOGIT_IDS ids evenly over the vocabulary, the best one among them."""
    spread = np.linspace(0, vocab_size - 1, min(vocab_size, LOGIT_IDS - 1)).astype(np.int64)
    return np.unique(np.append(spread, best))


def _compare_tokens(run: GoldenRun, expected: GoldenExpectation) -> tuple[int, list[str]]:
    """Compare tokens up to the first difference, after which the texts may differ anyway.

    Returns:
        The number of near ties (0 or 1), and the problems.
    """
    for step, (got, want) in enumerate(zip(run.tokens, expected.tokens, strict=False)):
        if got == want:
            continue
        scores = run.logits[step]
        if want < len(scores) and scores[got] - scores[want] <= expected.tolerance:
            return 1, []
        return 0, [f"token {step + 1} of {len(expected.tokens)} is {got}, recorded was {want}"]
    if (made := len(run.tokens)) != len(expected.tokens):
        return 0, [f"{made} tokens were made, recorded were {len(expected.tokens)}"]
    return 0, []


def _not_finite(run: GoldenRun) -> list[str]:
    bad = int((~np.isfinite(run.logits)).sum())
    return [f"{bad} of {run.logits.size} logits are not finite"] if bad else []
