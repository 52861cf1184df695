"""The graphs of the layout `components` as functions on numpy arrays.

The runtime itself runs the Hub's layout; this is what `verify` and the probe run the other with. A
program of one's own is in examples/components_loop.py.

N patches, P prefix rows, S new tokens, W the tower's width, D the decoder's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import onnxruntime as ort

from vlmport.bundle import Bundle, Manifest
from vlmport.errors import BundleError, PromptError
from vlmport.layouts import COMPONENTS
from vlmport.precisions import precision_name
from vlmport.runtime.sessions import HOST, ORT_ERRORS, Device, first_line, open_session

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

IMAGE, VISION, PROJECTION = "image_processor", "vision_encoder", "projection"
BEGIN, GO_ON = "prefix_init", "language_model"
OUTPUT = {
    IMAGE: "pixel_values",
    VISION: "last_hidden_state",
    PROJECTION: "projected_prefix",
    BEGIN: "logits",
    GO_ON: "logits",
}

Cache = dict[str, np.ndarray]


@dataclass(frozen=True)
class Encoded:
    """What the vision encoder gives for one picture.

    Attributes:
        pooled: None where the checkpoint has no pooling head.
    """

    hidden: Float[np.ndarray, "N W"]
    pooled: Float[np.ndarray, " W"] | None


class FourFiles:
    """The graphs of a bundle in the layout `components`, on one device, for one picture.

    Attributes:
        choice: component → precision.
    """

    def __init__(self, bundle: Bundle, choice: Mapping[str, str], device: Device):
        self.bundle, self.choice, self.device = bundle, choice, device
        self._sessions: dict[str, ort.InferenceSession] = {}

    @classmethod
    def open(
        cls, bundle: Bundle | str | Path, *, precision: str = "auto", device: str = "cpu"
    ) -> Self:
        """Choose the graphs; sessions open at first use.

        Raises BundleError for a bad bundle, another layout or a precision that it lacks,
        DeviceError for a device that this ONNX Runtime lacks.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        bundle.needs_layout(COMPONENTS)
        place = Device.parse(device)
        return cls(bundle, bundle.manifest.choose(precision, place.name), place)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def precision(self) -> str:
        """One name where all components share it, else 'component=precision,…'."""
        return precision_name(self.choice)

    def session(self, component: str) -> ort.InferenceSession:
        """The session of a component, created at first use; preprocessing is always on the CPU."""
        if component not in self._sessions:
            path = self.bundle.path(self.bundle.variant(component, self.choice[component]).model)
            self._sessions[component] = open_session(
                path, HOST if component == IMAGE else self.device
            )
        return self._sessions[component]

    def close(self) -> None:
        """Release all sessions. A later call opens them again."""
        self._sessions.clear()

    def pixels(self, rgb: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "1 3 h w"]:
        """Resize and normalise one picture."""
        return self._run(IMAGE, {"image": np.ascontiguousarray(rgb)})[OUTPUT[IMAGE]]

    def encode(self, pixels: Float[np.ndarray, "1 3 h w"]) -> Encoded:
        values = self._run(VISION, {"pixel_values": pixels})
        pooled = values.get("pooler_output")
        return Encoded(values[OUTPUT[VISION]][0], None if pooled is None else pooled[0])

    def project(self, hidden: Float[np.ndarray, "N W"]) -> Float[np.ndarray, "N D"]:
        return self._run(PROJECTION, {"vision_hidden_states": hidden[None]})[OUTPUT[PROJECTION]][0]

    def begin(
        self, prefix: Float[np.ndarray, "P D"], ids: Int[np.ndarray, " S"]
    ) -> tuple[Float[np.ndarray, "P+S V"], Cache]:
        """Logits of every row and the cache, of a prefix and the ids after it, maybe none.

        Raises PromptError for an id outside the vocabulary.
        """
        feeds = {"prefix_embeddings": prefix[None], "input_ids": self._checked(ids)[None]}
        return self._logits(BEGIN, feeds)

    def go_on(
        self, ids: Int[np.ndarray, " S"], cache: Cache
    ) -> tuple[Float[np.ndarray, "S V"], Cache]:
        """Logits of every new row and the grown cache. Raises PromptError as `begin` does."""
        past = next(iter(cache.values())).shape[2]
        positions = np.arange(past, past + len(ids), dtype=np.int64)
        mask = np.ones((1, past + len(ids)), np.int64)
        feeds = {"attention_mask": mask, "position_ids": positions[None], **cache}
        return self._logits(GO_ON, {"input_ids": self._checked(ids)[None], **feeds})

    def greedy(
        self,
        prefix: Float[np.ndarray, "P D"],
        ids: Int[np.ndarray, " S"],
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
    ) -> tuple[list[int], Float[np.ndarray, "n V"]]:
        """The most likely tokens up to a stop token, it included, and the logits of each."""
        stops = frozenset(stop_token_ids)
        logits, cache = self.begin(prefix, ids)
        rows = [logits[-1]]
        tokens = [int(logits[-1].argmax())]
        while tokens[-1] not in stops and len(tokens) < max_new_tokens:
            logits, cache = self.go_on(np.array(tokens[-1:]), cache)
            rows.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, np.stack(rows)

    def _logits(self, component: str, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Cache]:
        """The first row's logits, and the cache under the names under which it is fed back."""
        values, names = self._run(component, feeds), self.manifest.cache
        cache = {
            names.past + name.removeprefix(names.present): value
            for name, value in values.items()
            if name.startswith(names.present)
        }
        if not cache:
            raise BundleError(
                f"{component}: no output {names.present + '…'!r}; it has {', '.join(values)}",
                hint="export the bundle again",
            )
        return values[OUTPUT[component]][0], cache

    def _checked(self, ids: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        ids, size = np.ascontiguousarray(ids, np.int64), self.manifest.dims.vocab_size
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise PromptError(
                f"token ids {ids.min()} to {ids.max()}, the vocabulary has {size}",
                hint="does the tokenizer belong to this bundle?",
            )
        return ids

    def _run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. Raises BundleError where the graph can't run or lacks its output."""
        session = self.session(component)
        try:
            values = session.run(None, dict(feeds))
        except ORT_ERRORS as error:
            raise BundleError(
                f"{component} can't run: {first_line(error)}",
                hint="`vlmport inspect --probe` says whether this device runs this bundle",
            ) from error
        names = [one.name for one in session.get_outputs()]
        if OUTPUT[component] not in names:
            raise BundleError(
                f"{component}: no output {OUTPUT[component]!r}; it has {', '.join(names)}",
                hint="export the bundle again",
            )
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
