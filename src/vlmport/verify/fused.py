"""The ladder of the layout `fused`: two graphs, for pictures of one size.

The reference sees every picture resized to that size, with the filter of its processor, which then
leaves it as it is.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle
from vlmport.errors import SourceError
from vlmport.runtime.fused import TEXT, Fused
from vlmport.verify import metrics
from vlmport.verify.climbing import (
    Climb,
    bundle_prompt,
    climb_all,
    closeness,
    prompt_found,
    told_truths,
)
from vlmport.verify.judging import Found, Judge, Progress, bundle_runs, max_new_tokens, row_of
from vlmport.verify.limits import FUSED_RUNGS, fused_limits_of
from vlmport.verify.lookup import look_up
from vlmport.verify.protocol import FixedSizeReference, Reference
from vlmport.verify.report import Row
from vlmport.verify.requests import Request
from vlmport.verify.truth import Truth

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PADS = (3, 2)  # tokens before and after a sequence that is padded on both sides


@dataclass(frozen=True)
class FusedLadder:
    """The bundle's side at one precision, and the reference.

    Attributes:
        request: with the pictures as they are.
        truth: of the same with resized ones.
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this request, so that n
            requests cover the whole table.
    """

    graphs: Fused
    reference: FixedSizeReference
    request: Request
    truth: Truth
    share: tuple[int, int]

    def climb(self, precision: str) -> Iterator[Row]:
        """Every rung in order, whether or not one before it broke."""
        limits = fused_limits_of(precision, self.graphs.manifest.pixels.resample)
        for rung in FUSED_RUNGS:
            find = getattr(self, f"_{rung}")
            yield row_of(self.request.name, precision, rung, limits[rung], find)

    def _pixels(self) -> Found:
        wrong, largest = 0, 0.0
        for picture, truth in zip(self.request.pictures, self.truth.pictures, strict=True):
            with bundle_runs():
                ours = self.graphs.pixels(picture.rgb)
            planes = self.reference.planes(truth.pixels)
            wrong += metrics.unequal(ours, planes)
            largest = max(largest, metrics.max_error(ours, planes))
        levels = largest / self.reference.grey_level
        return {"wrong": wrong, "levels": levels}, f"{levels:.3g} grey levels" if wrong else None

    def _vision_features(self) -> Found:
        worst, typical, cosine = [0.0], [0.0], [1.0]
        for truth in self.truth.pictures:
            planes = self.reference.planes(truth.pixels)
            with bundle_runs():
                ours = self.graphs.encode(planes)
            values, _ = closeness(ours, truth.features)
            worst.append(values["worst"])
            typical.append(values["typical"])
            cosine.append(values["cosine"])
        return {"worst": max(worst), "typical": max(typical), "cosine": min(cosine)}, None

    def _embeddings(self) -> Found:
        """A share of the vocabulary, cut out of the graph."""
        k, n = self.share
        words = np.arange(k, self.reference.dims["vocab_size"], n)
        words = words[words != self.graphs.manifest.prompt.image_token_id]
        with bundle_runs():
            ours = look_up(self.graphs.path(TEXT), words)
        width = self.reference.dims["hidden_size"]
        expected = self.reference.embeds(words, self.truth.features[:0])[:, :width]
        return {
            "wrong": metrics.unequal(ours, expected),
            "cosine": metrics.least_cosine(ours, expected),
            "8 bits": metrics.rounding_steps(ours, expected, 8),
            "7 bits": metrics.rounding_steps(ours, expected, 7, width),
            "4 bits": metrics.rounding_steps(ours, expected, 4),
        }, None

    def _first_logits(self) -> Found:
        """One pass over prompt and answer, its positions those of the graph."""
        with bundle_runs():
            ours = self.graphs.logits(self.truth.ids, self.truth.features)
        return closeness(ours, self.truth.logits, tail=self._tail)

    def _padded_logits(self) -> Found:
        """The same beside a row that is one token longer at either end, so padded to its length."""
        ids, features, token = self.truth.ids, self.truth.features, int(self.truth.ids[0])
        before, after = PADS
        pad = np.full(before, token), np.full(after, token)
        rows = np.stack([np.concatenate([pad[0], ids, pad[1]])] * 2)
        mask = np.ones_like(rows)
        mask[0, :before] = mask[0, before + len(ids) :] = 0
        with bundle_runs():
            both = self.graphs.batch_logits(rows, mask, np.concatenate([features, features]))
        ours = both[0, before : before + len(ids)]
        return closeness(ours, self.truth.logits, tail=self._tail)

    def _greedy_tokens(self) -> Found:
        """A plain loop over one graph, from the reference's features."""
        ids, features = self.truth.prompt_ids, self.truth.features
        return self._judge.stops(self._greedy(ids, features))

    def _end_to_end(self) -> Found:
        """From the pictures and messages to the tokens by the bundle alone."""
        graphs, pictures = self.graphs, self.request.pictures
        with bundle_runs():
            made = [graphs.encode(graphs.pixels(picture.rgb)) for picture in pictures]
            ids = bundle_prompt(graphs.bundle, self.request, [graphs.prompt_ids()] * len(made))
        features = np.concatenate([self.truth.features[:0], *made])
        return prompt_found(
            self._judge.tokens(self._greedy(ids, features)), ids, self.truth.prompt_ids
        )

    def _greedy(self, ids: Int[np.ndarray, " P"], features: Float[np.ndarray, "T D"]) -> list[int]:
        manifest = self.graphs.manifest
        stops, most = manifest.generation.stop_token_ids, max_new_tokens(manifest)
        with bundle_runs():
            return self.graphs.greedy(ids, features, most, stops)[0]

    @property
    def _tail(self) -> int:
        """Rows from which a token is predicted."""
        return len(self.truth.ids) - len(self.truth.prompt_ids) + 1

    @property
    def _judge(self) -> Judge:
        def logits(at: int) -> Float[np.ndarray, " V"]:
            ids = np.concatenate([self.truth.prompt_ids, self.truth.made.tokens[:at]])
            return self.graphs.logits(ids, self.truth.features)[-1]

        return Judge(self.reference, self.truth, self.graphs.manifest, logits)


def fused_truth(reference: FixedSizeReference, graphs: Fused, request: Request) -> Truth:
    """The truth of a request whose pictures have the graphs' size."""
    manifest, size = graphs.manifest, graphs.image_size
    resized = reference.at_size(request, size.width, size.height)
    return Truth.of(reference, resized, max_new_tokens(manifest), manifest.prompt.image_token_id)


def run_fused_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request, one precision at a time.

    `progress` is told of each rung: how many are done, of how many, and what is next.
    Raises SourceError for a reference of another kind of model.
    """
    if not isinstance(reference, FixedSizeReference):
        raise SourceError(
            f"{bundle.folder}: its layout has pictures of one size, the reference's model has no "
            "such",
            hint="give the checkpoint that `vlmport export` was given",
        )
    tell = progress or (lambda done, total, what: None)
    first = Fused.open(bundle, precision=precisions[0])
    truths = told_truths(requests, lambda one: fused_truth(reference, first, one), tell)
    first.close()

    @contextmanager
    def open_at(precision: str) -> Iterator[Climb]:
        graphs = Fused.open(bundle, precision=precision)

        def climb(number: int) -> Iterator[Row]:
            share = (number, len(requests))
            ladder = FusedLadder(graphs, reference, requests[number], truths[number], share)
            return ladder.climb(precision)

        yield climb
        graphs.close()

    return climb_all(precisions, requests, FUSED_RUNGS, open_at, tell)
