"""Measure one bundle at one precision: each stage alone, and what Python costs beside them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

from vlmport.benchmark.machine import median, milliseconds
from vlmport.runtime.cache import KeyValueCache
from vlmport.runtime.components import DECODER, Components
from vlmport.runtime.model import VLM


@dataclass(frozen=True)
class Run:
    """One run of ONNX Runtime, in seconds of the clock."""

    component: str
    start: float
    end: float


class TimedSession:
    """A session of ONNX Runtime whose runs are noted."""

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
    """Components that note each run of ONNX Runtime.

    Attributes:
        runs: in their order.
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
    """The median over tokens of the time between two runs of the decoder, less all runs in it."""
    ends = [at for at, run in enumerate(runs) if run.component == DECODER]
    tokens = []
    for previous, this in itertools.pairwise(ends):
        inside = sum(run.end - run.start for run in runs[previous + 1 : this + 1])
        tokens.append(runs[this].end - runs[previous].end - inside)
    return 1000 * median(tokens)


@dataclass
class Bench:
    """One precision, ready to be measured again and again.

    Attributes:
        lengths: of the prompts, in tokens.
        new_tokens: decoded after each of them.
    """

    components: TimedComponents
    picture: np.ndarray
    lengths: tuple[int, ...]
    new_tokens: int
    vlm: VLM = field(init=False)
    _cache: KeyValueCache = field(init=False)
    _vision: Mapping[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.vlm = VLM(self.components)
        limit = self.components.manifest.dims.context_length
        capacity = max(self.lengths, default=0) + self.new_tokens
        self._cache = KeyValueCache(self.components.decoder, 1, capacity, limit)
        self._vision = self.components.process_image(self.picture).inputs

    def round(self) -> dict[str, float]:
        """Each figure once, by the names of FIGURES; those of a length end in '@length'."""
        figures = {
            "image_ms": milliseconds(lambda: self.components.process_image(self.picture)),
            "encode_ms": milliseconds(lambda: self.components.encode_image(self._vision)),
        }
        for length in self.lengths:
            figures[f"prefill_ms@{length}"] = self._prefill(length)
            figures[f"decode_tokens_per_s@{length}"] = self._decode()
        figures["python_ms"] = self._python()
        return figures

    def _prefill(self, length: int) -> float:
        """Milliseconds from the embeddings of so many tokens to the logits of the last."""
        embeds = self.components.embed(self._ids(length))[0]
        self._cache.lengths[0] = 0
        return milliseconds(lambda: self._cache.prefill(0, embeds))

    def _decode(self) -> float:
        """Tokens per second after what was prefilled: embed the last, run, take the best."""
        token = self._ids(1)
        start = time.perf_counter()
        for _ in range(self.new_tokens):
            token[...] = self._cache.step(self.components.embed(token))[0].argmax()
        return self.new_tokens / (time.perf_counter() - start)

    def _python(self) -> float:
        """Milliseconds a token outside ONNX Runtime, in a whole caption's decoding."""
        self.components.runs.clear()
        tokens = self.new_tokens
        self.vlm.caption(self.picture, max_new_tokens=tokens, min_new_tokens=tokens)
        return python_milliseconds(self.components.runs)

    def _ids(self, length: int) -> np.ndarray:
        """Ids i64[1, S] all over the vocabulary."""
        vocabulary = self.components.manifest.dims.vocab_size
        return np.random.default_rng(length).integers(0, vocabulary, (1, length))
