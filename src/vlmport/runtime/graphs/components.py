"""The graphs of the layout `hub` as functions on numpy arrays.

The runtime, `verify` and the probe all go through these. Sessions open at first use, so text alone
needs no vision session. A graph is fed what its own inputs name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from vlmport.bundle import Bundle
from vlmport.bundle.layouts import HUB
from vlmport.errors import BundleError, PromptError
from vlmport.runtime.graphs.base import IMAGE, POSITIONS, BundleGraphs
from vlmport.runtime.graphs.decoder import Decoder, scales_by_call
from vlmport.runtime.graphs.devices import Engines
from vlmport.runtime.graphs.image_processor import (
    VISION,
    ProcessedImage,
    option_feeds,
    out_of_memory,
    process_image,
)
from vlmport.runtime.graphs.positions import AGAIN, Positions, computed, counted, image_inputs
from vlmport.runtime.graphs.sessions import (
    ORT_ERRORS,
    first_line,
    is_out_of_memory,
    refusal,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

EMBED = "embed_tokens"
DECODER = "decoder_model_merged"
IMAGES = "num_images"  # the axis of the vision encoder's inputs whose indices are independent


class Components(BundleGraphs):
    """The graphs of a bundle in the layout `hub`, which the runtime runs."""

    layout = HUB

    def __init__(
        self,
        bundle: Bundle,
        choice: Mapping[str, str],
        engines: Engines,
        threads: int | None = None,
        *,
        older_attention: bool = False,
    ):
        super().__init__(bundle, choice, engines, threads, older_attention=older_attention)
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder's session, with its cache inputs and outputs paired."""
        if (found := self._decoder) is not None:
            return found
        with self._opening:
            session = self.session(DECODER)
            decoder = Decoder.of(
                session,
                self.manifest.cache,
                DECODER,
                row_by_row=scales_by_call(self.path(DECODER)),
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
        super().release(component)
        if component == DECODER:
            self._decoder = None

    def close(self) -> None:
        self._decoder = None
        super().close()

    def process_image(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        options: Mapping[str, Any] | None = None,
    ) -> ProcessedImage:
        """Resize, normalise and lay out one image.

        Args:
            options: further inputs of the graph, over the manifest's `image_options`.

        Raises OptionError for an option that the graph does not have, ImageError where the graph
        refuses the image, BundleError where it gives no prompt ids.
        """
        options = {**self.manifest.image_options, **(options or {})}
        return process_image(self.session(IMAGE), rgb, options)

    def check_image_options(self, options: Mapping[str, Any]) -> None:
        """Raise OptionError for an option that the image processor lacks, or of a wrong type."""
        option_feeds(self.session(IMAGE), options)

    def encode_image(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """Encode the image processor's outputs; those that the encoder does not take are left out.

        Where every input of the encoder has an axis named `num_images`, the CPU runs its indices
        one after the other: all in one call take many times the memory, and longer.

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
        parts = one_by_one(session, feeds) if self.engines[VISION].is_processor else [feeds]
        runs = [_run(session, VISION, ["image_features"], part)[0] for part in parts]
        return np.concatenate([features.reshape(-1, features.shape[-1]) for features in runs])

    def embed(self, ids: Int[np.ndarray, "B S"]) -> Float[np.ndarray, "B S D"]:
        """Look token ids up in the embedding table. Raises PromptError for an id outside of it."""
        feeds = {"input_ids": self.checked(ids, EMBED)}
        return _run(self.session(EMBED), EMBED, ["inputs_embeds"], feeds)[0]

    def position_ids(
        self, ids: Int[np.ndarray, " S"], images: Sequence[Mapping[str, np.ndarray]] = ()
    ) -> Positions:
        """Compute the positions of a prompt's tokens: 0, 1, …, or by the bundle's graph for them.

        Args:
            ids: the whole prompt, image tokens included.
            images: the image processor's outputs for each image, in the order of the prompt.

        Raises BundleError for a graph that asks for something else, PromptError where it refuses
        these images.
        """
        if POSITIONS not in self.manifest.components:
            return counted(ids)
        return computed(self.session(POSITIONS), ids, images, POSITIONS)

    @property
    def position_inputs(self) -> frozenset[str]:
        """The outputs of the image processor that positions are computed from."""
        if POSITIONS not in self.manifest.components:
            return frozenset()
        return frozenset(image_inputs(self.session(POSITIONS)))

    def decode(
        self,
        embeds: Float[np.ndarray, "B S D"],
        attention_mask: Int[np.ndarray, "B P+S"],
        position_ids: Int[np.ndarray, "... B S"],
        past: Mapping[str, np.ndarray] | None = None,
        num_logits_to_keep: int = 0,
    ) -> tuple[Float[np.ndarray, "B n V"], dict[str, np.ndarray]]:
        """Run the decoder once, with a cache that grows: for `verify`, not for speed.

        Args:
            past: the cache that the last pass returned; None for an empty one.
            num_logits_to_keep: return the logits of this number of last positions; 0 for all.

        Returns:
            float32 logits, and the cache under the names of its inputs.

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
    """Return a copy of embeds with the features, in order, in the rows of image_token_id.

    Source: transformers 5.23, the masked_scatter of LlavaModel.forward.
    Raises PromptError unless exactly T such rows exist, or where the widths differ.
    """
    at = np.flatnonzero(ids == image_token_id)
    if len(at) != len(features):
        raise PromptError(
            f"{len(at)} image tokens in the prompt, {len(features)} features",
            hint="write one placeholder for each image in the prompt, and no image token by hand",
            code="prompt.wrong-features",
        )
    merged = embeds.copy()
    if not len(at):
        return merged
    if features.shape[1] != embeds.shape[1]:
        raise PromptError(
            f"features are {features.shape[1]} wide, embeddings {embeds.shape[1]}",
            hint="check that all files belong to one bundle",
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
            f"{component} failed: {first_line(error)}",
            hint="run `vlmport inspect --probe` to test whether this device runs this bundle",
            code="graph.run-failed",
        ) from error


def one_by_one(
    session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Cut the vision encoder's inputs along the axis IMAGES, if every input has it."""
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
