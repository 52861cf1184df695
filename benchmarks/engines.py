"""The engines that peers.py compares, one in a process: reads requests, answers in JSON.

    python benchmarks/engines.py NAME FOLDER THREADS TOKENS [--prepare]

FOLDER is a workload's. `--prepare` converts the model and ends, so that the memory of a conversion
is not the engine's. An engine says which figures it has: `encode_ms@n` is the tower and the
projection on n images, `prefill_ms@n` from n ids to the logits of the last,
`decode_tokens_per_s@n` greedy steps after n, `request_s` from the pixels of a request to its last
token.
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
from workload import Workload

from vlmport.benchmark.machine import peak_memory


class Engine(Protocol):
    """A model that is loaded. `prefill` returns logits of the last id, or None where it can't."""

    can_encode: bool

    @staticmethod
    def prepare(precision: str, folder: Path) -> None:
        """Convert what has to be converted."""

    def encode(self, images: int) -> np.ndarray:
        """Features f32[T, D] of so many images."""
        ...

    def prefill(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray | None:
        """The features stand for the image tokens among the ids, in order."""
        ...

    def decode(self, steps: int) -> None:
        """Greedy steps after the last prefill."""


class Vlmport:
    can_encode = True

    @staticmethod
    def prepare(precision: str, folder: Path) -> None:
        """The workload's writer has exported the bundle."""

    def __init__(self, precision: str, folder: Path, threads: int):
        from vlmport.runtime.graphs.cache import KeyValueCache
        from vlmport.runtime.graphs.components import Components

        workload = Workload.read(folder)
        self.components = Components.open(folder / "bundle", precision=precision, threads=threads)
        limit = self.components.manifest.dims.context_length
        longest = max(workload.lengths) + max(64, workload.new_tokens)
        self.cache = KeyValueCache(self.components.decoder, 1, longest, limit)
        self.inputs = {n: dict(np.load(folder / f"inputs-{n}.npz")) for n in workload.images}
        self.image_token_id = workload.image_token_id
        self.token = np.zeros((1, 1), np.int64)

    def encode(self, images: int) -> np.ndarray:
        return self.components.encode_image(self.inputs[images])

    def prefill(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        from vlmport.runtime.graphs.components import merge_image_features

        embeds = self.components.embed(ids[None])[0]
        if features is not None:
            embeds = merge_image_features(embeds, ids, features, self.image_token_id)
        self.cache.lengths[0] = 0
        logits = self.cache.prefill(0, embeds)[-1]
        self.token[...] = logits.argmax()
        return logits

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            logits = self.cache.step(self.components.embed(self.token))
            self.token[...] = logits[0].argmax()


class Torch:
    """transformers with its growing cache, in float32 or bfloat16; images all at once."""

    can_encode = True

    @staticmethod
    def prepare(precision: str, folder: Path) -> None:
        """Nothing to convert."""

    def __init__(self, precision: str, folder: Path, threads: int):
        import torch
        from torch_parts import load_parts

        torch.set_num_threads(threads)
        self.torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.tower, self.model = load_parts(folder, dtype)
        workload = Workload.read(folder)
        self.pixels = {
            n: torch.from_numpy(np.load(folder / f"pixels-{n}.npy")).to(dtype)
            for n in workload.images
        }
        self.image_token_id = workload.image_token_id
        self.cache: Any = None
        self.token: Any = None

    def encode(self, images: int) -> np.ndarray:
        with self.torch.inference_mode():
            features = self.tower(self.pixels[images])
        return features.flatten(0, 1).float().numpy()

    def prefill(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        torch = self.torch
        with torch.inference_mode():
            known = torch.from_numpy(ids[None])
            embeds = self.model.get_input_embeddings()(known)
            if features is not None:
                rows = torch.from_numpy(features).to(embeds.dtype)
                embeds[known == self.image_token_id] = rows
            done = self.model(inputs_embeds=embeds, logits_to_keep=1)
        self.cache, self.token = done.past_key_values, done.logits.argmax(-1)
        return done.logits.float().numpy()

    def decode(self, steps: int) -> None:
        with self.torch.inference_mode():
            for _ in range(steps):
                done = self.model(
                    input_ids=self.token, past_key_values=self.cache, logits_to_keep=1
                )
                self.token = done.logits.argmax(-1)


def class_of(name: str) -> tuple[Any, str]:
    """An engine's class, and its precision."""
    kind, _, precision = name.partition(" ")
    if kind == "vlmport":
        return Vlmport, precision
    if kind == "torch":
        return Torch, precision
    import engines_native

    made = {
        "genai": engines_native.Genai,
        "openvino": engines_native.OpenVino,
        "llama.cpp": engines_native.LlamaCpp,
    }
    return made[kind], precision


def request(engine: Engine, workload: Workload, prompt: np.ndarray) -> None:
    """From pixels to the last new token."""
    engine.prefill(prompt, engine.encode(workload.images[-1]))
    engine.decode(workload.new_tokens - 1)


def measures_of(
    engine: Engine, workload: Workload, prompt: np.ndarray | None, steps: int
) -> dict[str, Callable[[], float]]:
    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def again(call: Callable[[], object]) -> float:
        """Milliseconds of a second call: the first one wakes a process that has slept."""
        call()
        return 1000 * timed(call)

    def encode(images: int) -> float:
        if images == 1:
            return again(lambda: engine.encode(1))
        return 1000 * timed(lambda: engine.encode(images))  # seconds long: waking is nothing

    def decode(length: int) -> float:
        engine.prefill(workload.ids(length))
        return steps / timed(lambda: engine.decode(steps))

    measures: dict[str, Callable[[], float]] = {}
    if engine.can_encode:
        for n in workload.images:
            measures[f"encode_ms@{n}"] = lambda n=n: encode(n)
    for n in workload.lengths:
        ids = workload.ids(n)
        measures[f"prefill_ms@{n}"] = lambda ids=ids: again(lambda: engine.prefill(ids))
    for n in workload.lengths:
        measures[f"decode_tokens_per_s@{n}"] = lambda n=n: decode(n)
    if prompt is not None and engine.can_encode:
        measures["request_s"] = lambda: timed(lambda: request(engine, workload, prompt))
    return measures


def main() -> None:
    name, folder, threads, steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    made, precision = class_of(name)
    if "--prepare" in sys.argv:
        made.prepare(precision, folder)
        return
    workload, path = Workload.read(folder), folder / "prompt.npy"
    prompt = np.load(path) if path.exists() else None
    engine: Engine = made(precision, folder, threads)
    measures = measures_of(engine, workload, prompt, steps)
    for line in sys.stdin:
        what = line.strip()
        answer: Any
        if what == "figures":
            answer = list(measures)
        elif what == "peak":
            answer = peak_memory()
        elif what in ("text", "request"):
            answer = saved_logits(engine, what, workload, prompt, folder / name.replace(" ", "-"))
        else:
            answer = measures[what]()
        print("answer " + json.dumps(answer), flush=True)


def saved_logits(
    engine: Engine, what: str, workload: Workload, prompt: np.ndarray | None, path: Path
) -> str | None:
    """The file of the logits after a prompt of text, or after that of a request; None for none."""
    if what == "text":
        logits = engine.prefill(workload.ids(workload.lengths[0]))
    elif prompt is None or not engine.can_encode:
        return None
    else:
        logits = engine.prefill(prompt, engine.encode(workload.images[-1]))
    if logits is None:
        return None
    np.save(path, logits)
    return f"{path}.npy"


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of some engines never end by themselves
