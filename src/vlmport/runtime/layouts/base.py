"""Run the graphs of the layouts other than `hub`.

The runtime answers with the layout `hub` only; `verify` and the probe run the others with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from vlmport.errors import BundleError, PromptError
from vlmport.runtime.graphs.base import BundleGraphs
from vlmport.runtime.graphs.sessions import ORT_ERRORS, first_line, refusal

Cache = dict[str, np.ndarray]


class LayoutGraphs(BundleGraphs):
    """The graphs of a bundle in one of these layouts.

    Attributes:
        outputs: component → the output that it must have.
    """

    outputs: ClassVar[Mapping[str, str]]

    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph, and return all outputs by name.

        Raises PromptError where the graph refuses its input, BundleError where it fails or
        lacks the output that it must have.
        """
        session = self.session(component)
        try:
            values = session.run(None, dict(feeds))
        except ORT_ERRORS as error:
            if (refused := refusal(error)) is not None:
                raise PromptError(
                    f"{component}: {refused[0]}", hint=refused[1], code="prompt.refused"
                ) from error
            raise BundleError(
                f"{component} failed: {first_line(error)}",
                hint="run `vlmport inspect --probe` to test whether this device runs this bundle",
                code="graph.run-failed",
            ) from error
        names = [one.name for one in session.get_outputs()]
        if (expected := self.outputs[component]) not in names:
            raise BundleError(
                f"{component}: no output {expected!r}; it has {', '.join(names)}",
                hint="export the bundle again",
                code="bundle.wrong-graph",
            )
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def presents(self, component: str, values: Mapping[str, np.ndarray]) -> Cache:
        """Return the cache among a decoder's outputs, under the names of its inputs.

        Raises BundleError where there is none.
        """
        names = self.manifest.cache
        cache = {
            names.past + name.removeprefix(names.present): value
            for name, value in values.items()
            if name.startswith(names.present)
        }
        if not cache:
            raise BundleError(
                f"{component}: no output {names.present + '…'!r}; it has {', '.join(values)}",
                hint="export the bundle again",
                code="bundle.wrong-graph",
            )
        return cache
