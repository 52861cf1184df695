"""Compare what an engine computes with ONNX Runtime's CPU kernels: a program of its own.

It reads one JSON object from stdin and writes a line of JSON for each component that begins, and
one for each that is done, so that the caller knows which one crashed it.

Each component runs on the golden input and on a drawn one of another size, several times, in two
sessions: some engines are wrong at the first run of a shape only, and some differ from run to run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import MANIFEST, Bundle, read_manifest
from vlmport.errors import VlmportError
from vlmport.runtime.engines.tolerance import coarseness, tolerance_of
from vlmport.runtime.engines.trust import WHOLE
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import DECODER, EMBED, VISION, Components
from vlmport.runtime.graphs.devices import HOST, Device, Engines
from vlmport.runtime.graphs.positions import Positions
from vlmport.runtime.graphs.sessions import return_freed_memory
from vlmport.runtime.layouts.golden import golden_image
from vlmport.runtime.layouts.hub import golden_prompt
from vlmport.runtime.probe import check_golden

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

SESSIONS, RUNS = 2, 2
CHUNK = 40  # tokens that are read after a cache; more than 32, see operators of WebGPU

Trace = list[tuple[str, np.ndarray]]
"""What a component gave: a description of each result, and the result."""


@dataclass(frozen=True)
class Verdict:
    """What was found about a component on an engine.

    Attributes:
        component: its name, or WHOLE.
        error: the largest difference, in standard deviations of the result.
        problem: what is wrong; None if the engine may be trusted with it.
    """

    component: str
    engine: str
    form: str
    error: float
    tolerance: float
    problem: str | None


@dataclass(frozen=True)
class Inputs:
    """The inputs of all components, computed on the CPU.

    Attributes:
        images: the vision encoder's inputs, for the golden image and for a drawn one.
        ids: token ids of the golden prompt.
    """

    images: tuple[Mapping[str, np.ndarray], ...]
    ids: Int64[np.ndarray, " S"]
    embeds: Float[np.ndarray, "S D"]
    positions: Positions
    next_embeds: Float[np.ndarray, "n D"]


def drawn_image(height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draw an image of another size than the golden one: a gradient with noise."""
    rng = np.random.default_rng(17)
    H, W = height + height // 2 + 1, width * 2 + 3
    y, x = np.mgrid[0:H, 0:W]
    base = np.stack([y * 255 / H, x * 255 / W, (x + y) * 255 / (H + W)], axis=-1)
    return np.clip(base + rng.normal(0, 30, base.shape), 0, 255).astype(np.uint8)


def make_inputs(host: Components) -> Inputs:
    """Compute the inputs of each component, on the CPU."""
    golden = host.manifest.golden
    image = golden_image(golden)
    images = tuple(
        host.process_image(one, golden.options).inputs
        for one in (image, drawn_image(*image.shape[:2]))
    )
    prompt = golden_prompt(host, golden)
    room = host.manifest.dims.context_length - len(prompt.ids) - 2
    rows = host.embedding_rows(EMBED)
    ids = np.random.default_rng(5).integers(0, rows, max(2, min(CHUNK, room)))
    return Inputs(images, prompt.ids, prompt.embeds, prompt.positions, host.embed(ids[None])[0])


def trace(components: Components, component: str, inputs: Inputs) -> Trace:
    """Run a component through the functions that the runtime calls."""
    if component == VISION:
        return [
            (f"image {number + 1}", components.encode_image(one))
            for number, one in enumerate(inputs.images)
        ]
    if component == EMBED:
        ids = inputs.ids
        return [
            (f"{part.size} tokens", components.embed(part))
            for part in (ids[None], ids[:1, None], ids[:3, None], ids[None, :5])
        ]
    assert component == DECODER
    return _trace_decoder(components, inputs)


def _trace_decoder(components: Components, inputs: Inputs) -> Trace:
    """Read the golden prompt, more tokens after a cache, a step, and a step of two rows."""
    more, limit = inputs.next_embeds, components.manifest.dims.context_length
    S, n = len(inputs.embeds), len(inputs.next_embeds) - 2
    cache = KeyValueCache(components.decoder, 2, min(limit, S + n + 4), limit)
    cache.rope_deltas[0] = inputs.positions.rope_delta
    found = [("the prompt", cache.prefill(0, inputs.embeds, inputs.positions.ids).copy())]
    if n > 0:
        found.append(("tokens after a cache", cache.prefill(0, more[:n]).copy()))
    found.append(("a step", cache.step(more[None, n : n + 1]).copy()))
    cache.copy_row(0, 1)
    found.append(("a step of two rows", cache.step(more[n:, None]).copy()))
    found += [("the cache", buffer.astype(np.float32)) for buffer in cache.buffers]
    return found


def compare(want: Trace, got: Trace, tolerance: float) -> tuple[float, str | None]:
    """Return the largest error in standard deviations of a result, and the first problem."""
    worst, problem = 0.0, None
    for (what, expected), (_, result) in zip(want, got, strict=True):
        if expected.shape != result.shape:
            problem = problem or f"{what} has shape {result.shape}, expected {expected.shape}"
            continue
        if bad := int((~np.isfinite(expected)).sum()):
            problem = (
                problem or f"{what}: {bad} of {expected.size} values of the CPU are not finite"
            )
            continue
        if bad := int((~np.isfinite(result)).sum()):
            problem = problem or f"{what}: {bad} of {result.size} values are not finite"
            continue
        spread = float(expected.std()) or 1.0
        error = float(np.abs(expected - result).max(initial=0.0)) / spread
        worst = max(worst, error)
        if not error <= tolerance:
            problem = problem or f"{what} is off by {error:.3g} standard deviations"
    return worst, problem


def probe_component(
    bundle: Bundle,
    choice: Mapping[str, str],
    component: str,
    device: Device,
    inputs: Inputs,
    threads: int | None,
) -> Verdict:
    """Compare one component on an engine with the same graph on the CPU."""
    engines = dict.fromkeys(choice, HOST)
    host = Components(bundle, choice, engines, threads)
    want = trace(host, component, inputs)
    host.close()
    return_freed_memory()
    tolerance = tolerance_of(choice[component], device)
    worst, problems = 0.0, []
    for _ in range(SESSIONS):
        tried = Components(bundle, choice, engines | {component: device}, threads)
        for _ in range(RUNS):
            error, problem = _run(tried, component, inputs, want, tolerance)
            worst = max(worst, error)
            problems.append(problem)
        tried.close()
    problem = next((one for one in problems if one is not None), None)
    if problem is not None and None in problems:
        wrong = sum(one is not None for one in problems)
        problem += f", in {wrong} of {len(problems)} runs: it differs from run to run"
    return Verdict(component, str(device), choice[component], worst, tolerance, problem)


def _run(
    tried: Components, component: str, inputs: Inputs, want: Trace, tolerance: float
) -> tuple[float, str | None]:
    try:
        return compare(want, trace(tried, component, inputs), tolerance)
    except VlmportError as error:
        return 0.0, str(error)


def probe_whole(
    bundle: Bundle, choice: Mapping[str, str], engines: Engines, threads: int | None
) -> Verdict | None:
    """Compare the whole bundle with its recorded results; None where none are recorded."""
    graphs = Components(bundle, choice, engines, threads)
    name = graphs.precision
    recorded = bundle.manifest.golden.expected.get(name)
    if recorded is None:
        return None
    coarser = max(coarseness(name, device) for device in engines.values())
    expected = replace(recorded, tolerance=recorded.tolerance * coarser)
    try:
        report = check_golden(graphs, expected=expected)
    except VlmportError as error:
        return Verdict(WHOLE, graphs.device, name, 0.0, expected.tolerance, str(error))
    problem = "; ".join(report.problems) or None
    return Verdict(WHOLE, graphs.device, name, report.logit_error, report.tolerance, problem)


def probe(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is begun and what is found for the components of a request, in order."""
    folder = Path(request["folder"])
    bundle = Bundle(folder, read_manifest(folder / MANIFEST))
    choice: Mapping[str, str] = request["choice"]
    engines = {name: Device.parse(text) for name, text in request["engines"].items()}
    threads = request["threads"]
    host = Components(bundle, choice, dict.fromkeys(choice, HOST), threads)
    inputs = make_inputs(host)
    host.close()
    return_freed_memory()
    passed = True
    for component in request["components"]:
        yield {"begins": component}
        found = probe_component(bundle, choice, component, engines[component], inputs, threads)
        yield asdict(found)
        passed = passed and found.problem is None
    if passed:
        yield {"begins": WHOLE}
        if (whole := probe_whole(bundle, choice, engines, threads)) is not None:
            yield asdict(whole)
    yield {"done": True}


def write_lines(lines: Iterator[dict[str, Any]], out: IO[str]) -> None:
    for line in lines:
        out.write(json.dumps(line) + "\n")
        out.flush()


def main() -> None:
    """Answer the request on stdin. What an engine prints goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        write_lines(probe(json.load(sys.stdin)), out)
    # Threads of some engines never end by themselves.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
