"""The golden input of a bundle, and the result of running it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Golden
from vlmport.errors import BundleError
from vlmport.runtime.graphs.base import BundleGraphs
from vlmport.runtime.graphs.positions import Positions

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64, UInt8

Feeds = Iterator[tuple[str, Mapping[str, np.ndarray]]]
"""Components, and their inputs by name, without those of a cache."""


@dataclass(frozen=True)
class GoldenRun:
    """The result of running the golden input.

    Attributes:
        logits: the logits of each generated token; the first are those of the prompt.
        faults: messages about a wrong cache or a wrong prompt.
    """

    prefill_tokens: int
    tokens: tuple[int, ...]
    logits: Float32[np.ndarray, "n V"]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class GoldenPrompt:
    """The image's prompt ids, `copies` times, without any text; the image's features in it."""

    ids: Int64[np.ndarray, " S"]
    embeds: Float[np.ndarray, "S D"]
    positions: Positions


def golden_image(golden: Golden) -> UInt8[np.ndarray, "H W 3"]:
    """Decode the golden image. Raises BundleError unless it is height × width × 3 bytes."""
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


def check_fits(graphs: BundleGraphs, tokens: int) -> None:
    """Raise BundleError where the golden input is longer than the context."""
    limit = graphs.manifest.dims.context_length
    if tokens > limit:
        raise BundleError(
            f"the golden input takes {tokens} tokens, the context is {limit}",
            hint="export the bundle again",
            code="bundle.wrong-golden",
        )


def length_faults(golden: Golden, length: int, what: str) -> tuple[str, ...]:
    """Return a fault if the prompt does not have the recorded length."""
    if length == golden.prefill_tokens:
        return ()
    return (f"the {what}, recorded were {golden.prefill_tokens}",)
