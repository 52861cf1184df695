"""The graphs of a bundle as functions on numpy arrays.

The runtime, `verify` and the probe all go through these. Sessions are created at first use, so
text alone needs no vision session. What a graph is called with follows its own inputs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnxruntime as ort

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.layouts import HUB
from vlmport.bundle.precisions import precision_name
from vlmport.errors import (
    BundleError,
    PromptError,
)
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.graphs.decoder import Decoder, scales_by_call
from vlmport.runtime.graphs.embedding import check_ids, embedding_rows
from vlmport.runtime.graphs.image_processor import (
    IMAGE,
    VISION,
    ProcessedImage,
    option_feeds,
    out_of_memory,
    process_image,
)
from vlmport.runtime.graphs.positions import AGAIN, Positions, computed, counted, picture_inputs
from vlmport.runtime.graphs.refusals import refusal
from vlmport.runtime.graphs.sessions import (
    HOST,
    ORT_ERRORS,
    Device,
    first_line,
    is_out_of_memory,
    open_session,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

EMBED = "embed_tokens"
POSITIONS = "position_ids"
DECODER = "decoder_model_merged"
IMAGES = "num_images"  # the axis of the vision encoder's inputs whose indices are independent


class Components:
    """The graphs of a bundle at chosen precisions on one device. Threads may share it.

    Attributes:
        choice: component → precision.
    """

    def __init__(
        self, bundle: Bundle, choice: Mapping[str, str], device: Device, threads: int | None = None
    ):
        self.bundle, self.choice, self.device, self.threads = bundle, choice, device, threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._opening = threading.RLock()  # two threads open no graph twice
        self._decoder: Decoder | None = None

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> Self:
        """Choose the graphs; sessions open at first use, each with up to `threads` threads.

        Raises BundleError for a bad bundle, one of another layout or a precision that it lacks,
        DeviceError for a device that this ONNX Runtime lacks, OptionError for a thread count below
        1.
        """
        if threads is not None:
            threads = whole_number("threads", threads, 1)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        bundle.needs_layout(HUB)
        place = Device.parse(device)
        return cls(bundle, bundle.manifest.choose(precision, place.name), place, threads)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def precision(self) -> str:
        """One name where all components share it, else 'component=precision,…'."""
        return precision_name(self.choice)

    @property
    def opened(self) -> tuple[str, ...]:
        """The components whose sessions exist by now."""
        return tuple(self._sessions)

    def session(self, component: str) -> ort.InferenceSession:
        """The session of a component, created at first use; preprocessing is always on the CPU."""
        if (found := self._sessions.get(component)) is not None:
            return found
        with self._opening:
            if (found := self._sessions.get(component)) is None:
                variant = self.bundle.variant(component, self.choice[component])
                device = HOST if component in (IMAGE, POSITIONS) else self.device
                path = self.bundle.path(variant.model)
                found = open_session(path, device, threads=self.threads)
                self._sessions[component] = found
            return found

    @property
    def decoder(self) -> Decoder:
        """The decoder's session with its cache names paired."""
        if (found := self._decoder) is not None:
            return found
        with self._opening:
            session = self.session(DECODER)
            path = self.bundle.path(self.bundle.variant(DECODER, self.choice[DECODER]).model)
            decoder = Decoder.of(
                session, self.manifest.cache, DECODER, row_by_row=scales_by_call(path)
            )
            if decoder.positions_rank == 3 and POSITIONS not in self.manifest.components:
                raise BundleError(
                    f"{DECODER}: takes positions on three axes, which no component gives",
                    hint=AGAIN,
                    code="bundle.wrong-graph",
                )
            if decoder.vocab_size != (expected := self.manifest.dims.vocab_size):
                raise BundleError(
                    f"{DECODER}: scores {decoder.vocab_size} tokens, vlmport.json says {expected}",
                    hint=AGAIN,
                    code="bundle.wrong-graph",
                )
            self._decoder = decoder
            return decoder

    def release(self, component: str) -> None:
        """Release one session. A later call opens it again."""
        self._sessions.pop(component, None)
        if component == DECODER:
            self._decoder = None

    def close(self) -> None:
        """Release all sessions. A later call opens them again."""
        self._decoder = None
        self._sessions.clear()

    def process_image(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        options: Mapping[str, Any] | None = None,
    ) -> ProcessedImage:
        """Resize, normalise and lay out one picture.

        `options` are further inputs of the graph; the manifest's are taken where they say nothing.

        Raises OptionError for an option that the graph does not have, ImageError where the graph
        refuses the picture, BundleError where it gives no prompt ids.
        """
        options = {**self.manifest.image_options, **(options or {})}
        return process_image(self.session(IMAGE), rgb, options)

    def check_image_options(self, options: Mapping[str, Any]) -> None:
        """Raise OptionError for one that the image processor does not have, or of another kind."""
        option_feeds(self.session(IMAGE), options)

    def encode_image(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """Image features of the processor's output; outputs that the encoder lacks are left out.

        Where every input of the encoder has an axis named `num_images`, the CPU runs one index of
        it after the other: all at once take many times the memory, and longer.

        Raises BundleError where an input of the encoder is not among them.
        """
        session = self.session(VISION)
        names = [one.name for one in session.get_inputs()]
        if missing := [name for name in names if name not in inputs]:
            raise BundleError(
                f"{VISION}: input {missing[0]!r} is not made by the image processor, which gives "
                f"{', '.join(inputs)}",
                hint="export the bundle again",
                code="bundle.wrong-graph",
            )
        feeds = {name: inputs[name] for name in names}
        parts = _one_by_one(session, feeds) if self.device == HOST else [feeds]
        runs = [_run(session, VISION, ["image_features"], part)[0] for part in parts]
        return np.concatenate([features.reshape(-1, features.shape[-1]) for features in runs])

    def embed(self, ids: Int[np.ndarray, "B S"]) -> Float[np.ndarray, "B S D"]:
        """Rows of the embedding table. Raises PromptError for an id outside it."""
        self.check_ids(ids)
        feeds = {"input_ids": np.ascontiguousarray(ids, np.int64)}
        return _run(self.session(EMBED), EMBED, ["inputs_embeds"], feeds)[0]

    @functools.cached_property
    def embedding_rows(self) -> int:
        """How many ids have an embedding: the rows of the graph's table."""
        variant = self.bundle.variant(EMBED, self.choice[EMBED])
        return embedding_rows(self.manifest, self.bundle.path(variant.model))

    def check_ids(self, ids: Int[np.ndarray, ...]) -> None:
        """Raise PromptError for an id without an embedding: some kernels give zeros for it, and
        some count a negative one from the end."""
        check_ids(ids, self.embedding_rows, self.bundle.folder)

    def position_ids(
        self, ids: Int[np.ndarray, " S"], pictures: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Positions:
        """Where a prompt's tokens stand: 0, 1, …, or what the bundle's graph for it says.

        Args:
            ids: of the whole prompt, pictures' ids included.
            pictures: what the image processor gave for each picture, in the order of their ids.

        Raises BundleError for a graph that can't be served, PromptError where it refuses these
        pictures.
        """
        if POSITIONS not in self.manifest.components:
            return counted(ids)
        return computed(self.session(POSITIONS), ids, pictures, POSITIONS)

    @property
    def position_inputs(self) -> frozenset[str]:
        """What positions are computed from, of what the image processor gives."""
        if POSITIONS not in self.manifest.components:
            return frozenset()
        return frozenset(picture_inputs(self.session(POSITIONS)))

    def decode(
        self,
        embeds: Float[np.ndarray, "B S D"],
        attention_mask: Int[np.ndarray, "B P+S"],
        position_ids: Int[np.ndarray, "... B S"],
        past: Mapping[str, np.ndarray] | None = None,
        num_logits_to_keep: int = 0,
    ) -> tuple[Float[np.ndarray, "B n V"], dict[str, np.ndarray]]:
        """One pass in the plain form, with a cache that grows: for `verify`, not for speed.

        Args:
            past: what the pass before gave back as presents (under the cache's input names);
                None for none.
            num_logits_to_keep: logits of so many last positions; 0 for all.

        Returns:
            float32 logits, and the cache under the names under which it is fed back.

        Raises BundleError where the cache did not grow by exactly S.
        """
        decoder = self.decoder
        B, S = embeds.shape[:2]
        past = past or {port.past: port.empty(B) for port in decoder.ports}
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.asarray(attention_mask, np.int64),
            "position_ids": np.asarray(position_ids, np.int64),
            "num_logits_to_keep": np.array(num_logits_to_keep, np.int64),
            **past,
        }
        names = ["logits", *(port.present for port in decoder.ports)]
        feeds = {name: value for name, value in feeds.items() if name in decoder.inputs}
        logits, *presents = _run(decoder.session, DECODER, names, feeds)
        grown = dict(zip((port.past for port in decoder.ports), presents, strict=True))
        for name, present in grown.items():
            if present.shape[2] != past[name].shape[2] + S:
                raise BundleError(
                    f"{DECODER}: {name} grew from {past[name].shape[2]} to {present.shape[2]} "
                    f"after {S} tokens",
                    hint="export the bundle again",
                    code="bundle.wrong-graph",
                )
        return logits.astype(np.float32, copy=False), grown


def merge_image_features(
    embeds: Float[np.ndarray, "S D"],
    ids: Int[np.ndarray, " S"],
    features: Float[np.ndarray, "T D"],
    image_token_id: int,
) -> Float[np.ndarray, "S D"]:
    """A copy of embeds with features, in order, over the rows where ids == image_token_id.

    Source: transformers 5.23, the masked_scatter of LlavaModel.forward.
    Raises PromptError unless exactly T such rows exist, or where the widths differ.
    """
    at = np.flatnonzero(ids == image_token_id)
    if len(at) != len(features):
        raise PromptError(
            f"{len(at)} image tokens in the prompt, {len(features)} features",
            hint="is every picture's placeholder in the prompt, and no image token by hand?",
            code="prompt.wrong-features",
        )
    merged = embeds.copy()
    if not len(at):
        return merged
    if features.shape[1] != embeds.shape[1]:
        raise PromptError(
            f"features are {features.shape[1]} wide, embeddings {embeds.shape[1]}",
            hint="do all files belong to one bundle?",
            code="prompt.wrong-features",
        )
    merged[at] = features
    return merged


def _run(
    session: ort.InferenceSession,
    component: str,
    names: Sequence[str],
    feeds: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    try:
        return [np.asarray(value) for value in session.run(names, feeds)]
    except ORT_ERRORS as error:
        if (refused := refusal(error)) is not None:
            raise PromptError(
                f"{component}: {refused[0]}", hint=refused[1], code="prompt.refused"
            ) from error
        if is_out_of_memory(error):
            raise out_of_memory(component, error) from error
        raise BundleError(
            f"{component} can't run: {first_line(error)}",
            hint="`vlmport inspect --probe` says whether this device runs this bundle",
            code="graph.run-failed",
        ) from error


def _one_by_one(
    session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """The feeds cut along the axis IMAGES, if every input has it; else as they are."""
    axes = {
        one.name: one.shape.index(IMAGES) for one in session.get_inputs() if IMAGES in one.shape
    }
    counts = {feeds[name].shape[axis] for name, axis in axes.items()}
    if axes.keys() != feeds.keys() or len(counts) != 1:
        return [dict(feeds)]
    return [
        {name: np.take(feeds[name], [at], axis) for name, axis in axes.items()}
        for at in range(counts.pop())
    ]
