"""Where a graph's time goes: milliseconds by operator, as ONNX Runtime's own profiler has them.

    python benchmarks/op_profile.py BUNDLE [--precision auto] [--tokens 100] [--steps 32]

For the vision encoder, a prefill of so many tokens, and decode steps after it. Profiling costs time
of its own: shares are what to read, not sums. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported

import numpy as np
import onnxruntime as ort

from vlmport.benchmark.machine import describe_machine
from vlmport.benchmark.picture import gradient
from vlmport.bundle import Bundle
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import DECODER, VISION, Components

WARM_UP = 3  # runs before those that count


class ProfiledComponents(Components):
    """Components of which one has a session that is profiled.

    Attributes:
        profiled: its name.
        folder: where the profile is written.
    """

    profiled: str
    folder: Path

    def session(self, component: str) -> ort.InferenceSession:
        if component == self.profiled and component not in self._sessions:
            options = ort.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(self.folder / component)
            options.enable_mem_pattern = False
            options.log_severity_level = 3
            options.intra_op_num_threads = self.threads or 0
            path = self.bundle.path(self.bundle.variant(component, self.choice[component]).model)
            self._sessions[component] = ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        return super().session(component)


def profile(
    components: ProfiledComponents, work: Callable[[], None], runs: int
) -> dict[str, float]:
    """Operator → milliseconds of one run, the largest first.

    `work` has run WARM_UP times and then so many times as `runs` says; the first are left out.
    """
    for _ in range(WARM_UP + runs):
        work()
    file = components.session(components.profiled).end_profiling()
    events = json.loads(Path(file).read_text(encoding="utf-8"))
    calls: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            calls[event["name"]].append((event["args"]["op_name"], event["dur"] / 1000))
    totals: dict[str, float] = defaultdict(float)
    for one in calls.values():  # a node, in the order of its runs
        for operator, milliseconds in one[-runs:]:
            totals[operator] += milliseconds / runs
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def decoder_work(
    components: Components, tokens: int, steps: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A prefill, and a step after it."""
    limit = components.manifest.dims.context_length
    cache = KeyValueCache(components.decoder, 1, tokens + WARM_UP + steps, limit)
    vocabulary = components.manifest.dims.vocab_size
    embeds = components.embed(np.random.default_rng(0).integers(0, vocabulary, (1, tokens)))

    def prefill() -> None:
        cache.lengths[0] = 0
        cache.prefill(0, embeds[0])

    def step() -> None:
        cache.lengths[0] = max(int(cache.lengths[0]), tokens)
        cache.step(embeds[:, :1])

    return prefill, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=32, help="decode steps that count")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    bundle, shares = Bundle.open(arguments.bundle), {}
    with tempfile.TemporaryDirectory() as temporary:

        def opened(component: str) -> ProfiledComponents:
            components = ProfiledComponents.open(
                bundle, precision=arguments.precision, threads=arguments.threads
            )
            components.profiled, components.folder = component, Path(temporary)
            return components

        vision = opened(VISION)
        inputs = vision.process_image(gradient()).inputs
        shares["encode"] = profile(vision, lambda: vision.encode_image(inputs), 5)
        for name, at, runs in (("prefill", 0, 5), ("decode", 1, arguments.steps)):
            decoder = opened(DECODER)
            work = decoder_work(decoder, arguments.tokens, arguments.steps)
            if at:
                work[0]()
            shares[name] = profile(decoder, work[at], runs)
    for name, operators in shares.items():
        whole = sum(operators.values())
        print(f"{name}: {whole:.2f} ms in kernels")
        for operator, milliseconds in operators.items():
            print(f"  {operator:36}{milliseconds:10.3f} ms{100 * milliseconds / whole:7.1f} %")
    settings = {key: getattr(arguments, key) for key in ("precision", "tokens", "steps")}
    machine = describe_machine(arguments.threads)
    report = {"benchmark": "op_profile", "machine": machine, "settings": settings, "ms": shares}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
