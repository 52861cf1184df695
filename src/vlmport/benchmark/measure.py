"""Measure one bundle at one precision: each stage alone, and the time in Python between them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from vlmport.benchmark.machine import median, milliseconds
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import DECODER, Components
from vlmport.runtime.model import VLM


@dataclass(frozen=True)
class Run:
    """One run of a graph: its start and end, in seconds of the clock."""

    component: str
    start: float
    end: float


class TimedSession:
    """A session of ONNX Runtime that records its runs."""

    def __init__(self, session: ort.InferenceSession, component: str, runs: list[Run]):
        self._session, self._component, self._runs = session, component, runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> Any:
        return self._timed(self._session.run, arguments)

    def run_with_iobinding(self, *arguments: Any) -> Any:
        return self._timed(self._session.run_with_iobinding, arguments)

    def _timed(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        try:
            return run(*arguments)
        finally:
            self._runs.append(Run(self._component, start, time.perf_counter()))


class TimedComponents(Components):
    """Components that record each run of ONNX Runtime.

    Attributes:
        runs: the runs, in order.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.runs: list[Run] = []

    def session(self, component: str) -> ort.InferenceSession:
        if component not in self._sessions:
            timed: Any = TimedSession(super().session(component), component, self.runs)
            self._sessions[component] = timed
        return self._sessions[component]


def python_milliseconds(runs: Sequence[Run]) -> float:
    """Median over tokens of the time between two runs of the decoder, without the runs in it."""
    ends = [at for at, run in enumerate(runs) if run.component == DECODER]
    tokens = []
    for previous, this in itertools.pairwise(ends):
        inside = sum(run.end - run.start for run in runs[previous + 1 : this + 1])
        tokens.append(runs[this].end - runs[previous].end - inside)
    return 1000 * median(tokens)


class Bench:
    """The measurements of one precision.

    Attributes:
        measures: figure → a call that measures it once. Names of figures of n tokens end in '@n'.
    """

    def __init__(
        self,
        components: TimedComponents,
        picture: np.ndarray,
        lengths: Sequence[int],
        new_tokens: int,
    ):
        """Open the model, and prepare prompts of these lengths in tokens.

        Args:
            components: the graphs.
            picture: the image to process and encode.
            lengths: numbers of tokens of the prompts.
            new_tokens: number of tokens to decode after each prompt.
        """
        self.components, self.picture, self.new_tokens = components, picture, new_tokens
        self.vlm = VLM(components)
        limit = components.manifest.dims.context_length
        capacity = max(lengths, default=0) + new_tokens
        self._cache = KeyValueCache(components.decoder, 1, capacity, limit)
        self._vision = components.process_image(picture).inputs
        self.measures: dict[str, Callable[[], float]] = {
            "image_ms": lambda: milliseconds(lambda: components.process_image(picture)),
            "encode_ms": lambda: milliseconds(lambda: components.encode_image(self._vision)),
        }
        for length in sorted(lengths):
            self.measures |= {
                f"prefill_ms@{length}": functools.partial(self._prefill, length),
                f"decode_tokens_per_s@{length}": functools.partial(self._decode, length),
            }
        self.measures["python_ms"] = self._python

    def prefill(self, length: int) -> np.ndarray:
        """Prefill a prompt of `length` tokens, and return its last logits f32[V]."""
        self._cache.lengths[0] = 0
        return self._cache.prefill(0, self.components.embed(self.ids(length))[0])[-1]

    def ids(self, length: int) -> np.ndarray:
        """Random token ids i64[1, S], the same for the same length."""
        vocabulary = self.components.manifest.dims.vocab_size
        return np.random.default_rng(length).integers(0, vocabulary, (1, length))

    def _prefill(self, length: int) -> float:
        """Milliseconds from token ids to the last logits."""
        return milliseconds(lambda: self.prefill(length))

    def _decode(self, length: int) -> float:
        """Tokens per second after a prompt: embed the last token, run, take the most likely."""
        self.prefill(length)
        token = self.ids(1)
        start = time.perf_counter()
        for _ in range(self.new_tokens):
            token[...] = self._cache.step(self.components.embed(token))[0].argmax()
        return self.new_tokens / (time.perf_counter() - start)

    def _python(self) -> float:
        """Milliseconds per token outside ONNX Runtime, in the decoding of a caption."""
        self.components.runs.clear()
        tokens = self.new_tokens
        self.vlm.caption(self.picture, max_new_tokens=tokens, min_new_tokens=tokens)
        return python_milliseconds(self.components.runs)
