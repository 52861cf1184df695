"""The layouts of a bundle: the class that opens each, and how it runs the golden input.

Each module has the graphs of one layout as functions on arrays, `golden_run` and `golden_feeds`.
The graphs of `hub` are in graphs/components.py, because the runtime runs that layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmport.bundle import Bundle, Golden
from vlmport.bundle.layouts import COMPONENTS, FUSED, GENAI, HUB
from vlmport.runtime.graphs.base import BundleGraphs
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.layouts import components, fused, genai, hub
from vlmport.runtime.layouts.golden import Feeds, GoldenRun

__all__ = ["LAYOUTS", "LayoutRuntime", "open_graphs"]


@dataclass(frozen=True)
class LayoutRuntime:
    """How to run the graphs of one layout.

    Attributes:
        graphs: the class that opens them.
        golden_run: runs the golden input of a bundle, for a number of new tokens.
        golden_feeds: gives the golden input at each graph that may contain float16.
    """

    graphs: type[BundleGraphs]
    golden_run: Callable[[Any, Golden, int], GoldenRun]
    golden_feeds: Callable[[Any, Golden], Feeds]


LAYOUTS: Mapping[str, LayoutRuntime] = {
    HUB: LayoutRuntime(Components, hub.golden_run, hub.golden_feeds),
    COMPONENTS: LayoutRuntime(components.FourFiles, components.golden_run, components.golden_feeds),
    FUSED: LayoutRuntime(fused.Fused, fused.golden_run, fused.golden_feeds),
    GENAI: LayoutRuntime(genai.GenaiGraphs, genai.golden_run, genai.golden_feeds),
}


def open_graphs(bundle: Bundle, precision: str, device: str = "cpu") -> BundleGraphs:
    """Open the graphs of a bundle of any layout. Raises as `BundleGraphs.open` does."""
    return LAYOUTS[bundle.manifest.layout].graphs.open(bundle, precision=precision, device=device)
