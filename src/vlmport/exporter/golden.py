"""Record the golden probe: a fixed image, and the results of the exported graphs for it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlmport.bundle import Bundle, Golden, GoldenImage, Manifest
from vlmport.exporter.packing import largest_first
from vlmport.runtime.probe import open_graphs, record_golden

WIDTH, HEIGHT = 48, 36
MIN_PREFILL = 64


def golden_input(tokens_of: Callable[[int, int], int], options: Mapping[str, Any]) -> Golden:
    """Make an image with edges, a gradient and three different channels; no expectations yet.

    The prompt repeats it until at least MIN_PREFILL tokens are prefilled.

    Args:
        tokens_of: (height, width) → number of tokens of an image of this size, with these options.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rgb = np.stack([x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), (x + y) % 16 * 16], axis=-1)
    rgb[8:24, 12:30] = (200, 30, 40)
    image = GoldenImage(
        WIDTH, HEIGHT, base64.b64encode(rgb.astype(np.uint8).tobytes()).decode("ascii")
    )
    image_tokens = tokens_of(HEIGHT, WIDTH)
    copies = -(-MIN_PREFILL // image_tokens)
    return Golden(image, copies, copies * image_tokens, {}, options)


def record(bundle: Bundle, precisions: Sequence[str]) -> Manifest:
    """Run each precision, and return the manifest with its expectations."""
    golden = bundle.manifest.golden
    expected = {}
    for precision in precisions:
        with largest_first(bundle, precision) as sparing:
            expected[precision] = record_golden(open_graphs(sparing, precision), golden)
    return dataclasses.replace(
        bundle.manifest, golden=dataclasses.replace(golden, expected=expected)
    )
