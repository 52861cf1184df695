"""Try a device with the bundle's golden input before it is trusted.

The exporter records what its graphs give on this CPU; a probe runs the same and compares. It also
watches the cache: each run must write exactly the positions that it was fed, and no others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Golden, GoldenExpectation
from vlmport.errors import BundleError, some_names
from vlmport.runtime.golden import (
    GoldenPrompt,
    GoldenRun,
    Graphs,
    check_fits,
    golden_image,
    length_faults,
    run_layout,
)
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import (
    IMAGE,
    POSITIONS,
    VISION,
    Components,
    merge_image_features,
)
from vlmport.runtime.graphs.sessions import return_freed_memory

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

NEW_TOKENS = 16
LOGIT_IDS = 64
SPARE = 3  # positions past the end that must stay untouched
UNTOUCHED = 7.5  # what buffers are filled with; no key or value is this everywhere

# How far logits may be off, in standard deviations of the first logits. Quantized graphs round
# activations too, and each device does so in its own way; the known faults are far larger.
# fp16 stays within 0.003 of fp32 on the golden input (shapes, random weights of 2 and 6 layers).
TOLERANCE = {"fp32": 0.01, "fp16": 0.02}
QUANTIZED_TOLERANCE = 0.3


@dataclass(frozen=True)
class ProbeReport:
    """Whether a device gives what was recorded, and if not, what differs.

    Attributes:
        logit_error: the largest difference of a recorded logit.
        near_ties: tokens that differ, but whose scores are closer than the tolerance.
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


def golden_prompt(components: Components, golden: Golden) -> GoldenPrompt:
    """Make the golden prompt. Raises BundleError where it is longer than the context."""
    processed = components.process_image(golden_image(golden), golden.options)
    check_fits(components, golden.copies * len(processed.prompt_ids))
    features = components.encode_image(processed.inputs)
    ids = np.tile(processed.prompt_ids, golden.copies)
    token = components.manifest.prompt.image_token_id
    embeds = components.embed(ids[None])[0]
    embeds = merge_image_features(embeds, ids, np.tile(features, (golden.copies, 1)), token)
    positions = components.position_ids(ids, [processed.inputs] * golden.copies)
    return GoldenPrompt(ids, embeds, positions)


def run_golden(components: Components, golden: Golden, new_tokens: int = NEW_TOKENS) -> GoldenRun:
    """Prefill the golden prompt and generate greedily, past any stop token, in a watched cache."""
    prompt = golden_prompt(components, golden)
    ids = prompt.ids
    for component in (IMAGE, VISION, POSITIONS):  # the decoder takes their place in memory
        components.release(component)
    return_freed_memory()
    faults = [*length_faults(golden, len(ids), f"prompt has {len(ids)} tokens")]
    check_fits(components, len(ids) + new_tokens - 1)
    capacity = len(ids) + new_tokens + SPARE
    cache = KeyValueCache(components.decoder, 2, capacity, capacity)
    for buffer in cache.buffers:
        buffer.fill(UNTOUCHED)
    watch = CacheWatch(cache)
    cache.rope_deltas[0] = prompt.positions.rope_delta
    logits = [cache.prefill(0, prompt.embeds, prompt.positions.ids)[-1].copy()]
    faults += watch.changes(0, len(ids), "the prompt")
    tokens = [int(logits[0].argmax())]
    for step in range(1, new_tokens):
        scores = cache.step(components.embed(np.array([[tokens[-1]]])))
        if not faults:  # what follows a fault says nothing new
            faults += watch.changes(len(ids) + step - 1, len(ids) + step, f"step {step}")
        logits.append(scores[0].copy())
        tokens.append(int(scores[0].argmax()))
    return GoldenRun(len(ids), tuple(tokens), np.stack(logits), tuple(faults))


def _run(graphs: Graphs, golden: Golden, new_tokens: int) -> GoldenRun:
    if isinstance(graphs, Components):
        return run_golden(graphs, golden, new_tokens)
    return run_layout(graphs, golden, new_tokens)


def record_golden(
    components: Graphs, golden: Golden, *, tolerance: float | None = None
) -> GoldenExpectation:
    """Run the golden input and write down what it gives.

    Args:
        tolerance: of a logit; None takes TOLERANCE for the precision.

    Raises BundleError where the graphs themselves are at fault (cache, NaN).
    """
    room = components.manifest.dims.context_length - golden.prefill_tokens + 1
    run = _run(components, golden, max(1, min(NEW_TOKENS, room)))
    first = run.logits[0]
    if faults := [*run.faults, *_not_finite(run)]:
        raise BundleError(
            f"the golden input shows a fault in the graphs: {'; '.join(faults[:3])}",
            hint="please report this",
            code="export.invalid-graph",
        )
    share = TOLERANCE.get(components.precision, QUANTIZED_TOLERANCE)
    ids = logit_ids(len(first), run.tokens[0])
    return GoldenExpectation(
        tokens=run.tokens,
        logit_ids=tuple(int(i) for i in ids),
        logits=tuple(float(value) for value in first[ids]),
        tolerance=tolerance or max(1e-4, share * float(first.std())),
    )


def check_golden(
    components: Graphs,
    golden: Golden | None = None,
    expected: GoldenExpectation | None = None,
) -> ProbeReport:
    """Run the golden input and compare with what was recorded for this precision.

    Args:
        golden, expected: by default the manifest's.

    Raises BundleError where nothing was recorded for this precision.
    """
    golden = golden or components.manifest.golden
    expected = expected or golden.expected.get(components.precision)
    if expected is None:
        raise BundleError(
            f"no golden is recorded for precision {components.precision!r}",
            hint=f"probe one of {', '.join(golden.expected) or '(none)'}",
            code="bundle.wrong-golden",
        )
    start = time.perf_counter()
    run = _run(components, golden, len(expected.tokens))
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
        str(components.device),
        components.precision,
        tuple(problems),
        error,
        expected.tolerance,
        near_ties,
        seconds,
    )


def logit_ids(vocab_size: int, best: int) -> Int64[np.ndarray, " n"]:
    """LOGIT_IDS ids evenly over the vocabulary, the best one among them."""
    spread = np.linspace(0, vocab_size - 1, min(vocab_size, LOGIT_IDS - 1)).astype(np.int64)
    return np.unique(np.append(spread, best))


def _compare_tokens(run: GoldenRun, expected: GoldenExpectation) -> tuple[int, list[str]]:
    """(1, []) where the first difference is a near tie: after it the texts may well part."""
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


class CacheWatch:
    """Sees which positions of a cache's buffers change between two looks."""

    def __init__(self, cache: KeyValueCache):
        self.cache = cache
        self._before = [_bits(buffer).copy() for buffer in cache.buffers]

    def changes(self, start: int, stop: int, what: str, *, row: int = 0) -> list[str]:
        """Faults unless exactly the positions start … stop of `row` changed since last time."""
        stray, unwritten = [], []
        for port, before, buffer in zip(
            self.cache.decoder.ports, self._before, self.cache.buffers, strict=True
        ):
            changed: Bool[np.ndarray, "B K P"] = (before != _bits(buffer)).any(axis=-1)
            fed = np.zeros_like(changed)
            fed[row, :, start:stop] = True
            if (changed & ~fed).any():
                stray.append(port.past)
            if (fed & ~changed).any():
                unwritten.append(port.past)
            before[...] = _bits(buffer)
        faults = [f"{what} also changed other positions of {some_names(stray, 2)}"] * bool(stray)
        return faults + [f"{what} left {some_names(unwritten, 2)} unwritten"] * bool(unwritten)


def _bits(buffer: np.ndarray) -> np.ndarray:
    """The buffer as integers: NaN is unequal to itself."""
    return buffer.view(f"u{buffer.itemsize}")
