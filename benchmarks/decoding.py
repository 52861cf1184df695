"""What each way to decode costs beside greedy decoding, and what guesses save or lose.

    python benchmarks/decoding.py [--model SRC] [--precision P] [--threads N] [--repeats N]

One picture, in two lengths: until the model stops, and a long text, in which a small model repeats
itself. All ways are run in turn, so that they see the same load, and medians are compared. Guesses
(prompt_lookup_num_tokens) must give greedy's own tokens, or the benchmark fails. Prints a table,
then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported

import numpy as np
import onnxruntime as ort

import vlmport
from vlmport.errors import OptionError
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.model import VLM

ROOT = Path(__file__).parents[1]
LONG = 128  # new tokens
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "guess 4": {"prompt_lookup_num_tokens": 4},
    "guess 10": {"prompt_lookup_num_tokens": 10},
    "sampling": {"do_sample": True, "seed": 0},
    "penalties": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
    "regex": {"regex": "(?s:.*)"},
    "2 beams": {"num_beams": 2},
    "4 beams": {"num_beams": 4},
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        ms: median of prefill and decode together.
        calls: of the decoder.
        python: microseconds of a token spent outside ONNX Runtime, the least of all rounds.
        ratio: how much longer than greedy, for as many tokens; below 1 it is faster.
    """

    text: str
    way: str
    tokens: int
    calls: int
    ms: float
    python: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.text:8}{self.way:12}{self.tokens:8}{self.calls:8}{self.ms:10.1f}"
            f"{self.ms / self.tokens:10.2f}{self.python:10.0f}{self.ratio:9.2f}"
        )


class Watched:
    """A model whose calls of ONNX Runtime are counted and timed."""

    def __init__(self, vlm: VLM, image: np.ndarray):
        self.vlm, self.image = vlm, image
        self.calls, self.inside = 0, 0.0
        session = vlm.components.decoder.session
        self._run, self._embed = session.run_with_iobinding, vlm.components.embed
        session.run_with_iobinding = self._timed_run  # type: ignore[method-assign]
        vlm.components.embed = self._timed_embed  # type: ignore[method-assign]

    def _timed_run(self, binding: Any) -> None:
        start = time.perf_counter()
        self._run(binding)
        self.calls, self.inside = self.calls + 1, self.inside + time.perf_counter() - start

    def _timed_embed(self, ids: Any) -> Any:
        start = time.perf_counter()
        made = self._embed(ids)
        if self.calls:  # the prompt's embedding is no part of prefill
            self.inside += time.perf_counter() - start
        return made

    def round(self, options: dict[str, Any]) -> tuple[tuple[int, ...], int, float, float]:
        """Tokens, calls of the decoder, seconds in all, seconds outside ONNX Runtime."""
        self.calls, self.inside = 0, 0.0
        caption = self.vlm.caption(self.image, **options)
        seconds = caption.timings["prefill"] + caption.timings["decode"]
        return caption.token_ids, self.calls, seconds, seconds - self.inside


def measure(watched: Watched, text: str, common: dict[str, Any], repeats: int) -> list[Row]:
    """All ways that this model has, in turn."""
    ways = dict(WAYS)
    rounds: dict[str, list[tuple[tuple[int, ...], int, float, float]]] = {}
    for _ in range(repeats + 1):  # the first is not counted
        for name, options in list(ways.items()):
            try:
                rounds.setdefault(name, []).append(watched.round({**common, **options}))
            except OptionError as error:
                print(f"{text:8}{name:12}{error}")
                del ways[name], rounds[name]
    rows: list[Row] = []
    for name, made in rounds.items():
        tokens, calls = made[0][:2]
        if name.startswith("guess") and tokens != rounds["greedy"][0][0]:
            raise SystemExit(f"{name}: other tokens than greedy's")
        ms = 1000 * statistics.median(seconds for *_, seconds, _ in made[1:])
        python = 1e6 * min(outside for *_, outside in made[1:]) / len(tokens)
        first = rows[0] if rows else None
        ratio = ms / len(tokens) / (first.ms / first.tokens) if first else 1.0
        rows.append(
            Row(text, name, len(tokens), calls, round(ms, 2), round(python), round(ratio, 3))
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--image", type=Path, default=ROOT / "examples/red_square.png")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    vlm = vlmport.load(options.model, precision=options.precision, threads=options.threads)
    header = {
        "benchmark": "decoding",
        "model": vlm.components.manifest.name,
        "precision": vlm.precision,
        "vlmport": vlmport.__version__,
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
    }
    print(", ".join(f"{key} {value}" for key, value in header.items() if key != "benchmark"))
    columns = ("tokens", "calls", "ms", "ms/token", "Python µs", "ratio")
    widths = (8, 8, 10, 10, 10, 9)
    print(f"{'':20}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    watched = Watched(vlm, open_image(options.image))
    rows = measure(watched, "caption", {}, options.repeats)
    long = {"max_new_tokens": LONG, "min_new_tokens": LONG}
    rows += measure(watched, "long", long, options.repeats)
    print("ratio: time a token beside greedy's; below 1 is faster. Python: outside ONNX Runtime.")
    print(json.dumps({**header, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
