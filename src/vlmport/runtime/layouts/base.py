"""What the graphs of the layouts beside the Hub's share: how they are opened, run and closed.

The runtime itself runs the Hub's layout; `verify` and the probe run the others with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnxruntime as ort

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.precisions import precision_name
from vlmport.errors import BundleError, PromptError
from vlmport.runtime.graphs.embedding import check_ids, embedding_rows
from vlmport.runtime.graphs.refusals import refusal
from vlmport.runtime.graphs.sessions import HOST, ORT_ERRORS, Device, first_line, open_session

if TYPE_CHECKING:
    from jaxtyping import Int

IMAGE, POSITIONS = "image_processor", "position_ids"

Cache = dict[str, np.ndarray]


class LayoutGraphs:
    """The graphs of a bundle in one layout, on one device.

    Attributes:
        layout: the layout's name.
        outputs: component → the output that it can't be without.
        choice: component → precision.
    """

    layout: ClassVar[str]
    outputs: ClassVar[Mapping[str, str]]

    def __init__(self, bundle: Bundle, choice: Mapping[str, str], device: Device):
        self.bundle, self.choice, self.device = bundle, choice, device
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._rows: dict[str, int] = {}  # of the embedding in a component

    @classmethod
    def open(
        cls, bundle: Bundle | str | Path, *, precision: str = "auto", device: str = "cpu"
    ) -> Self:
        """Choose the graphs; sessions open at first use.

        Raises BundleError for a bad bundle, another layout or a precision that it lacks,
        DeviceError for a device that this ONNX Runtime lacks.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        bundle.needs_layout(cls.layout)
        place = Device.parse(device)
        return cls(bundle, bundle.manifest.choose(precision, place.name), place)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def precision(self) -> str:
        """One name where all components share it, else 'component=precision,…'."""
        return precision_name(self.choice)

    def path(self, component: str) -> Path:
        """Where the chosen graph of a component lies."""
        return self.bundle.path(self.bundle.variant(component, self.choice[component]).model)

    def session(self, component: str) -> ort.InferenceSession:
        """The session of a component, created at first use; preprocessing is always on the CPU."""
        if component not in self._sessions:
            device = HOST if component in (IMAGE, POSITIONS) else self.device
            self._sessions[component] = open_session(self.path(component), device)
        return self._sessions[component]

    def release(self, component: str) -> None:
        """Release one session. A later call opens it again."""
        self._sessions.pop(component, None)

    def close(self) -> None:
        """Release all sessions. A later call opens them again."""
        self._sessions.clear()

    def checked(self, ids: Int[np.ndarray, ...], component: str) -> Int[np.ndarray, ...]:
        """The ids as a graph takes them. Raises PromptError for one without an embedding."""
        ids = np.ascontiguousarray(ids, np.int64)
        if component not in self._rows:
            self._rows[component] = embedding_rows(self.manifest, self.path(component))
        check_ids(ids, self._rows[component], self.bundle.folder)
        return ids

    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Raises PromptError where the graph refuses its input, BundleError where it can't run or
        lacks its output.
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
                f"{component} can't run: {first_line(error)}",
                hint="`vlmport inspect --probe` says whether this device runs this bundle",
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
        """The cache among a decoder's outputs, under the names under which it is fed back.

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
