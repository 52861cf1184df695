"""The golden input in each layout: what it comes to, and what the graphs make of it.

runtime/probe.py judges. In the Hub's layout the cache is watched there; in the others it is the
graphs' own, or there is none.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import Bundle, Golden
from vlmport.bundle.layouts import COMPONENTS, FUSED, GENAI
from vlmport.errors import BundleError
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.positions import Positions
from vlmport.runtime.graphs.sessions import return_freed_memory
from vlmport.runtime.layouts.base import LayoutGraphs
from vlmport.runtime.layouts.components import FourFiles
from vlmport.runtime.layouts.fused import Fused
from vlmport.runtime.layouts.genai import VISION, GenaiGraphs

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64, UInt8

Graphs = Components | LayoutGraphs

# Without a cache, each token costs as much as the prompt.
FUSED_TOKENS = 4


@dataclass(frozen=True)
class GoldenRun:
    """What the golden input gave.

    Attributes:
        logits: of each generated token, the first from the prompt.
        faults: what was wrong with the cache or the prompt, in words.
    """

    prefill_tokens: int
    tokens: tuple[int, ...]
    logits: Float32[np.ndarray, "n V"]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class GoldenPrompt:
    """The picture's ids, `copies` times, with nothing round them; its features among them."""

    ids: Int64[np.ndarray, " S"]
    embeds: Float[np.ndarray, "S D"]
    positions: Positions


def golden_image(golden: Golden) -> UInt8[np.ndarray, "H W 3"]:
    """The golden picture's pixels. Raises BundleError where they are not height × width × 3."""
    image = golden.image
    try:
        flat = np.frombuffer(base64.b64decode(image.rgb, validate=True), np.uint8)
        return flat.reshape(image.height, image.width, 3)
    except ValueError as error:
        raise BundleError(
            f"golden.image: not {image.height}x{image.width}x3 bytes: {error}",
            hint="export the bundle again",
            code="bundle.wrong-golden",
        ) from error


def check_fits(graphs: Graphs, tokens: int) -> None:
    """Raise BundleError where the golden input is longer than the context."""
    limit = graphs.manifest.dims.context_length
    if tokens > limit:
        raise BundleError(
            f"the golden input takes {tokens} tokens, the context is {limit}",
            hint="export the bundle again",
            code="bundle.wrong-golden",
        )


def length_faults(golden: Golden, length: int, what: str) -> tuple[str, ...]:
    """A fault where the prompt is not as long as was recorded."""
    if length == golden.prefill_tokens:
        return ()
    return (f"the {what}, recorded were {golden.prefill_tokens}",)


def golden_prefix(files: FourFiles, golden: Golden) -> Float[np.ndarray, "P D"]:
    """The picture's projected patches, `copies` times."""
    hidden = files.encode(files.pixels(golden_image(golden))).hidden
    return np.tile(files.project(hidden), (golden.copies, 1))


def _run_four_files(files: FourFiles, golden: Golden, new_tokens: int) -> GoldenRun:
    prefix = golden_prefix(files, golden)
    check_fits(files, len(prefix) + new_tokens - 1)
    faults = length_faults(golden, len(prefix), f"prefix has {len(prefix)} rows")
    tokens, logits = files.greedy(prefix, np.zeros(0, np.int64), new_tokens)
    return GoldenRun(len(prefix), tuple(tokens), logits, faults)


def golden_fused(
    graphs: Fused, golden: Golden
) -> tuple[Int64[np.ndarray, " S"], Float[np.ndarray, "S D"]]:
    """Ids and features of the picture, `copies` times."""
    features = graphs.encode(graphs.pixels(golden_image(golden)))
    return np.tile(graphs.prompt_ids(), golden.copies), np.tile(features, (golden.copies, 1))


def _run_fused(graphs: Fused, golden: Golden, new_tokens: int) -> GoldenRun:
    new_tokens = min(new_tokens, FUSED_TOKENS)
    ids, features = golden_fused(graphs, golden)
    check_fits(graphs, len(ids) + new_tokens - 1)
    faults = length_faults(golden, len(ids), f"prompt has {len(ids)} tokens")
    tokens, logits = graphs.greedy(ids, features, new_tokens)
    return GoldenRun(len(ids), tuple(tokens), logits, faults)


def golden_genai(graphs: GenaiGraphs, golden: Golden) -> GoldenPrompt:
    """The prompt as the client puts it together. Raises BundleError where it is too long."""
    processed = graphs.process_image(golden_image(golden), golden.options)
    check_fits(graphs, golden.copies * len(processed.prompt_ids))
    features = np.tile(graphs.encode(processed.inputs), (golden.copies, 1))
    graphs.release(VISION)  # the decoder takes its place in memory
    return_freed_memory()
    ids = np.tile(processed.prompt_ids, golden.copies)
    positions = graphs.positions(ids, [processed.inputs] * golden.copies)
    return GoldenPrompt(ids, graphs.embed(ids, features), positions)


def _run_genai(graphs: GenaiGraphs, golden: Golden, new_tokens: int) -> GoldenRun:
    prompt = golden_genai(graphs, golden)
    length = len(prompt.ids)
    check_fits(graphs, length + new_tokens - 1)
    faults = length_faults(golden, length, f"prompt has {length} tokens")
    tokens, logits = graphs.greedy(
        prompt.embeds, prompt.positions, new_tokens, prompt_ids=prompt.ids
    )
    return GoldenRun(length, tuple(tokens), logits, faults)


_Run = Callable[[Any, Golden, int], GoldenRun]
_LAYOUTS: Mapping[str, tuple[type[LayoutGraphs], _Run]] = {
    COMPONENTS: (FourFiles, _run_four_files),
    FUSED: (Fused, _run_fused),
    GENAI: (GenaiGraphs, _run_genai),
}


def open_graphs(bundle: Bundle, precision: str, device: str = "cpu") -> Graphs:
    """The graphs of a bundle of any layout that can be probed. Raises as their `open` does."""
    kind, _ = _LAYOUTS.get(bundle.manifest.layout, (Components, None))
    return kind.open(bundle, precision=precision, device=device)


def run_layout(graphs: LayoutGraphs, golden: Golden, new_tokens: int) -> GoldenRun:
    """Prefill the golden prompt and generate greedily, past any stop token."""
    _, run = _LAYOUTS[graphs.layout]
    return run(graphs, golden, new_tokens)
