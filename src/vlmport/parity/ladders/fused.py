"""The ladder of the layout `fused`: two graphs, for pictures of one size.

The reference sees every picture resized to that size, with the filter of its processor, which then
leaves it as it is.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.layouts import ImageSize
from vlmport.errors import SourceError
from vlmport.parity.asked import Request
from vlmport.parity.embedding_of import look_up
from vlmport.parity.judging import Found, Progress, bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Climber,
    Share,
    Tensors,
    climb_all,
    closeness,
    embedding_figures,
    feature_figures,
    prompt_of,
    truth_of,
)
from vlmport.parity.limits import FUSED_RUNGS, Limit, fused_limits_of
from vlmport.parity.protocol import FixedSizeReference, Reference
from vlmport.parity.report import Row
from vlmport.parity.truth import Truth
from vlmport.runtime.layouts.fused import TEXT, VISION, Fused
from vlmport.runtime.prompt import Prompter

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PADS = (3, 2)  # tokens before and after a sequence that is padded on both sides


@dataclass(frozen=True)
class FusedLadder(Climber[Fused, FixedSizeReference]):
    """The ladder of two graphs. The request has its pictures as they are, the truth is of the same
    with resized ones."""

    rungs = FUSED_RUNGS

    @property
    def manifest(self) -> Manifest:
        return self.runtime.manifest

    def limits(self, precision: str) -> Mapping[str, Mapping[str, Limit]]:
        return fused_limits_of(precision, self.manifest.pixels.resample)

    def _pixels(self) -> Found:
        return self.pixel_figures(self._processed())

    def _processed(self) -> Iterator[tuple[Tensors, Tensors]]:
        for picture, truth in zip(self.request.pictures, self.truth.pictures, strict=True):
            with bundle_runs():
                ours = self.runtime.pixels(picture.rgb)
            yield {"pixel_values": ours}, {"pixel_values": self.reference.planes(truth.pixels)}

    def _vision_features(self) -> Found:
        return feature_figures(self._encoded())

    def _encoded(self) -> Iterator[tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]]:
        for truth in self.truth.pictures:
            planes = self.reference.planes(truth.pixels)
            with bundle_runs():
                ours = self.runtime.encode(planes)
            yield ours, truth.features

    def _embeddings(self) -> Found:
        """A share of the vocabulary, cut out of the graph."""
        words = self.words[self.words != self.manifest.prompt.image_token_id]
        with bundle_runs():
            ours = look_up(self.runtime.path(TEXT), words)
        expected = self.reference.embeds(words, self.truth.features[:0])
        without_lanes = expected[:, : self.reference.dims["hidden_size"]]
        return embedding_figures(ours, without_lanes), None

    def _first_logits(self) -> Found:
        """One pass over prompt and answer, its positions those of the graph."""
        with bundle_runs():
            ours = self.runtime.logits(self.truth.ids, self.truth.features)
        return closeness(ours, self.truth.logits, tail=self.tail)

    def _padded_logits(self) -> Found:
        """The same beside a row that is one token longer at either end, so padded to its length."""
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

    def _greedy_tokens(self) -> Found:
        """A plain loop over one graph, from the reference's features."""
        ids, features = self.truth.prompt_ids, self.truth.features
        return self.judge.stops(self._greedy(ids, features))

    def _end_to_end(self) -> Found:
        """From the pictures and messages to the tokens by the bundle alone."""
        with bundle_runs():
            tokens, ids = alone(self.runtime, self.request)
        return self.prompt_found(self.judge.tokens(tokens), ids)

    def _greedy(self, ids: Int[np.ndarray, " P"], features: Float[np.ndarray, "T D"]) -> list[int]:
        with bundle_runs():
            return greedy(self.runtime, ids, features)

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        ids = np.concatenate([self.truth.prompt_ids, self.truth.made.tokens[:at]])
        return self.runtime.logits(ids, self.truth.features)[-1]


def alone(graphs: Fused, request: Request) -> tuple[list[int], Int[np.ndarray, " P"]]:
    """From pictures and messages to the tokens; and the prompt's ids. Raises as the bundle does."""
    made = [graphs.encode(graphs.pixels(picture.rgb)) for picture in request.pictures]
    prompter = Prompter(graphs.bundle.folder, graphs.manifest.prompt)
    ids = prompt_of(request, graphs.manifest, prompter, [graphs.prompt_ids()] * len(made))
    none = np.zeros((0, graphs.session(VISION).get_outputs()[0].shape[1]), np.float32)
    return greedy(graphs, ids, np.concatenate([none, *made])), ids


def greedy(
    graphs: Fused, ids: Int[np.ndarray, " P"], features: Float[np.ndarray, "T D"]
) -> list[int]:
    """The tokens after a prompt, as many as the bundle makes at most."""
    manifest = graphs.manifest
    stops = manifest.generation.stop_token_ids
    return graphs.greedy(ids, features, max_new_tokens(manifest), stops)[0]


def fused_truth(
    reference: FixedSizeReference, manifest: Manifest, size: ImageSize, request: Request
) -> Truth:
    """The truth of a request whose pictures have the size of the graphs."""
    resized = reference.at_size(request, size.width, size.height)
    return truth_of(reference, manifest, resized)


def run_fused_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request.

    `progress` is told of each rung: how many are done, of how many, and what is next.
    Raises SourceError for a reference of another kind of model.
    """
    if not isinstance(reference, FixedSizeReference):
        raise SourceError(
            f"{bundle.folder}: its layout has pictures of one size, the reference's model has no "
            "such",
            hint="give the checkpoint that `vlmport export` was given",
            code="verify.other-checkpoint",
        )

    def open_at(precision: str) -> Fused:
        return Fused.open(bundle, precision=precision)

    with closing(open_at(precisions[0])) as graphs:
        size = graphs.image_size

    def prepare(request: Request, share: Share) -> Callable[[Fused], FusedLadder]:
        truth = fused_truth(reference, bundle.manifest, size, request)
        return lambda graphs: FusedLadder(graphs, reference, request, truth, share)

    return climb_all(FusedLadder.rungs, precisions, requests, prepare, open_at, alone, progress)
