"""The engines that peers.py compares, one in a process: reads requests, answers in JSON.

    python benchmarks/engines.py NAME FOLDER THREADS TOKENS

An engine says which figures it has. `encode_ms` is the tower and the projection on one picture,
`prefill_ms@n` from n ids to the logits of the last, `decode_tokens_per_s@n` greedy steps after n.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LENGTHS = (100, 1100)


class Engine(Protocol):
    """A model that is loaded. `prefill` returns logits of the last id, or None where it can't."""

    can_encode: bool

    def encode(self) -> None: ...
    def prefill(self, ids: np.ndarray) -> np.ndarray | None: ...
    def decode(self, steps: int) -> None:
        """Greedy steps after the last prefill."""


class Vlmport:
    can_encode = True

    def __init__(self, precision: str, folder: Path, threads: int):
        from vlmport.benchmark.picture import gradient
        from vlmport.export import export
        from vlmport.runtime.cache import KeyValueCache
        from vlmport.runtime.components import Components

        wanted = "fp32,q8,q4" if precision == "auto" else precision
        bundle = export(folder / "captioner", folder / f"bundle-{precision}", precisions=wanted)
        self.components = Components.open(bundle, precision=precision, threads=threads)
        limit = bundle.manifest.dims.context_length
        self.cache = KeyValueCache(self.components.decoder, 1, max(LENGTHS) + 64, limit)
        self.vision = self.components.process_image(gradient(224, 224)).inputs
        self.token = np.zeros((1, 1), np.int64)

    def encode(self) -> None:
        self.components.encode_image(self.vision)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.cache.lengths[0] = 0
        logits = self.cache.prefill(0, self.components.embed(ids[None])[0])[-1]
        self.token[...] = logits.argmax()
        return logits

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            logits = self.cache.step(self.components.embed(self.token))
            self.token[...] = logits[0].argmax()


class Torch:
    """transformers with its growing cache, in float32 or bfloat16."""

    can_encode = True

    def __init__(self, precision: str, folder: Path, threads: int):
        import torch
        from torch_parts import load_parts

        torch.set_num_threads(threads)
        self.torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.tower, self.model = load_parts(folder, dtype)
        side = self.tower.side
        self.pixels = torch.zeros(1, 3, side, side, dtype=dtype)
        self.cache: Any = None
        self.token: Any = None

    def encode(self) -> None:
        with self.torch.inference_mode():
            self.tower(self.pixels)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            done = self.model(input_ids=self.torch.from_numpy(ids[None]), logits_to_keep=1)
        self.cache, self.token = done.past_key_values, done.logits.argmax(-1)
        return done.logits.float().numpy()

    def decode(self, steps: int) -> None:
        with self.torch.inference_mode():
            for _ in range(steps):
                done = self.model(
                    input_ids=self.token, past_key_values=self.cache, logits_to_keep=1
                )
                self.token = done.logits.argmax(-1)


def make(name: str, folder: Path, threads: int) -> Engine:
    kind, _, precision = name.partition(" ")
    if kind == "vlmport":
        return Vlmport(precision, folder, threads)
    if kind == "torch":
        return Torch(precision, folder, threads)
    import engines_native

    made = {
        "genai": engines_native.Genai,
        "openvino": engines_native.OpenVino,
        "llama.cpp": engines_native.LlamaCpp,
    }
    return made[kind](precision, folder, threads)


def ids_of(length: int, vocabulary: int) -> np.ndarray:
    """Ids i64[S] all over the vocabulary, the same for every engine."""
    return np.random.default_rng(length).integers(0, vocabulary, length)


def measures_of(engine: Engine, vocabulary: int, steps: int) -> dict[str, Callable[[], float]]:
    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def again(call: Callable[[], object]) -> float:
        """Milliseconds of a second call: the first one wakes a process that has slept."""
        call()
        return 1000 * timed(call)

    def decode(length: int) -> float:
        engine.prefill(ids_of(length, vocabulary))
        return steps / timed(lambda: engine.decode(steps))

    measures = {"encode_ms": lambda: again(engine.encode)} if engine.can_encode else {}
    for n in LENGTHS:
        ids = ids_of(n, vocabulary)
        measures[f"prefill_ms@{n}"] = lambda ids=ids: again(lambda: engine.prefill(ids))
    for n in LENGTHS:
        measures[f"decode_tokens_per_s@{n}"] = lambda n=n: decode(n)
    return measures


def main() -> None:
    name, folder, threads, steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    config = json.loads((folder / "llama/config.json").read_text(encoding="utf-8"))
    vocabulary = config["vocab_size"]
    engine = make(name, folder, threads)
    measures = measures_of(engine, vocabulary, steps)
    for line in sys.stdin:
        what = line.strip()
        answer: Any
        if what == "figures":
            answer = list(measures)
        elif what.startswith("logits "):
            logits = engine.prefill(ids_of(int(what.split()[1]), vocabulary))
            path = folder / f"{name.replace(' ', '-')}.npy"
            answer = None if logits is None else str(path)
            if logits is not None:
                np.save(path, logits)
        else:
            answer = measures[what]()
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of some engines never end by themselves
