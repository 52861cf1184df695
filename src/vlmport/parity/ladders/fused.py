"""Climb from the image to the tokens through the two graphs of the layout `fused`.

Their images have one size. The reference sees every image resized to that size with the filter of
its own processor, which then leaves it as it is.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.layouts import FUSED, ImageSize
from vlmport.errors import SourceError
from vlmport.parity import limits
from vlmport.parity.asked import Request
from vlmport.parity.embedding_of import look_up
from vlmport.parity.judging import bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Answer,
    Ladder,
    Share,
    Tensors,
    closeness,
    embedding_figures,
    feature_figures,
    prompt_of,
    truth_of,
)
from vlmport.parity.protocol import FixedSizeReference, Reference
from vlmport.parity.rungs import Found, Rung
from vlmport.parity.truth import Truth
from vlmport.runtime.layouts.fused import TEXT, VISION, Fused
from vlmport.runtime.prompt import Prompter

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PADS = (3, 2)  # tokens before and after a sequence that is padded on both sides


@dataclass(frozen=True)
class FusedLadder(Ladder[Fused, FixedSizeReference]):
    """Compare the two graphs with the reference.

    The request has its images as they are; the truth is about the same images, resized.
    """

    layout = FUSED

    @classmethod
    def open(cls, bundle: Bundle, precision: str) -> Fused:
        return Fused.open(bundle, precision=precision)

    @classmethod
    def prepare(
        cls, reference: Reference, bundle: Bundle, precisions: Sequence[str]
    ) -> Callable[[Request, Share], Callable[[Fused], FusedLadder]]:
        if not isinstance(reference, FixedSizeReference):
            raise SourceError(
                f"{bundle.folder}: the layout {FUSED!r} has images of one size, and the "
                "reference's model can't be held to one",
                hint="give the checkpoint that the bundle was exported from",
                code="verify.other-checkpoint",
            )
        with closing(cls.open(bundle, precisions[0])) as graphs:
            size = graphs.image_size

        def ask(request: Request, share: Share) -> Callable[[Fused], FusedLadder]:
            truth = fused_truth(reference, bundle.manifest, size, request)
            return partial(cls, reference=reference, request=request, truth=truth, share=share)

        return ask

    @staticmethod
    def alone(runtime: Fused, request: Request) -> Answer:
        made = [runtime.encode(runtime.pixels(picture.rgb)) for picture in request.pictures]
        prompter = Prompter(runtime.bundle.folder, runtime.manifest.prompt)
        ids = prompt_of(request, runtime.manifest, prompter, [runtime.prompt_ids()] * len(made))
        none = np.zeros((0, runtime.session(VISION).get_outputs()[0].shape[1]), np.float32)
        return Answer(greedy(runtime, ids, np.concatenate([none, *made])), ids)

    @property
    def manifest(self) -> Manifest:
        return self.runtime.manifest

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        ids = np.concatenate([self.truth.prompt_ids, self.truth.made.tokens[:at]])
        return self.runtime.logits(ids, self.truth.features)[-1]

    def pixels(self) -> Found:
        """Compare each image as one plane with the processor's patches put together."""
        return self.pixel_figures(self._processed())

    def _processed(self) -> Iterator[tuple[Tensors, Tensors]]:
        for picture, truth in zip(self.request.pictures, self.truth.pictures, strict=True):
            with bundle_runs():
                ours = self.runtime.pixels(picture.rgb)
            yield {"pixel_values": ours}, {"pixel_values": self.reference.planes(truth.pixels)}

    def vision_features(self) -> Found:
        """Compare the features of each image."""
        return feature_figures(self._encoded())

    def _encoded(self) -> Iterator[tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]]:
        for truth in self.truth.pictures:
            planes = self.reference.planes(truth.pixels)
            with bundle_runs():
                ours = self.runtime.encode(planes)
            yield ours, truth.features

    def embeddings(self) -> Found:
        """Compare a share of the embedding, cut out of the graph."""
        words = self.words[self.words != self.manifest.prompt.image_token_id]
        with bundle_runs():
            ours = look_up(self.runtime.path(TEXT), words)
        expected = self.reference.embeds(words, self.truth.features[:0])
        without_lanes = expected[:, : self.reference.dims["hidden_size"]]
        return embedding_figures(ours, without_lanes), None

    def first_logits(self) -> Found:
        """Compare one pass over prompt and answer, whose positions the graph itself counts."""
        with bundle_runs():
            ours = self.runtime.logits(self.truth.ids, self.truth.features)
        return closeness(ours, self.truth.logits, tail=self.tail)

    def padded_logits(self) -> Found:
        """Compare the same pass in a batch with a longer row, so that both sides are padded."""
        ids, features, token = self.truth.ids, self.truth.features, int(self.truth.ids[0])
        before, after = PADS
        pad = np.full(before, token), np.full(after, token)
        rows = np.stack([np.concatenate([pad[0], ids, pad[1]])] * 2)
        mask = np.ones_like(rows)
        mask[0, :before] = mask[0, before + len(ids) :] = 0
        with bundle_runs():
            both = self.runtime.batch_logits(rows, mask, np.concatenate([features, features]))
        ours = both[0, before : before + len(ids)]
        return closeness(ours, self.truth.logits, tail=self.tail)

    def greedy_tokens(self) -> Found:
        """Judge the tokens of a plain loop over one graph, from the reference's features."""
        with bundle_runs():
            tokens = greedy(self.runtime, self.truth.prompt_ids, self.truth.features)
        return self.judge.stops(tokens)

    rungs = (
        Rung("pixels", pixels, limits.PIXELS),
        Rung("vision_features", vision_features, limits.FEATURES),
        Rung("embeddings", embeddings, limits.EMBEDDINGS),
        Rung("first_logits", first_logits, limits.LOGITS),
        Rung("padded_logits", padded_logits, limits.LOGITS),
        Rung("greedy_tokens", greedy_tokens, limits.GREEDY_TOKENS),
        Rung("end_to_end", Ladder.end_to_end, limits.END_TO_END),
    )


def greedy(
    graphs: Fused, ids: Int[np.ndarray, " P"], features: Float[np.ndarray, "T D"]
) -> list[int]:
    """Generate the tokens after a prompt, up to the bundle's maximum."""
    manifest = graphs.manifest
    stops = manifest.generation.stop_token_ids
    return graphs.greedy(ids, features, max_new_tokens(manifest), stops)[0]


def fused_truth(
    reference: FixedSizeReference, manifest: Manifest, size: ImageSize, request: Request
) -> Truth:
    """Ask the reference about a request, with its images resized to the size of the graphs."""
    resized = reference.at_size(request, size.width, size.height)
    return truth_of(reference, manifest, resized)
