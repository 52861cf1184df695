"""The ladder of the layout `genai`: its graphs, fed as onnxruntime-genai feeds them.

The rungs are the Hub's. What differs: the embedding's graph itself writes features over the image
tokens, the decoder gives logits of the last row alone, and its cache grows. That the client itself
says the same is a test's matter, which has it installed.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle
from vlmport.runtime.components import ProcessedImage
from vlmport.runtime.genai import GenaiGraphs
from vlmport.runtime.positions import Positions
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
from vlmport.verify.limits import RUNGS, genai_limits_of
from vlmport.verify.protocol import Reference
from vlmport.verify.report import Row
from vlmport.verify.requests import Request
from vlmport.verify.truth import PictureTruth, Truth

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class GenaiLadder:
    """The bundle's side at one precision, and the reference.

    Attributes:
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this request, so that n
            requests cover the whole table.
    """

    graphs: GenaiGraphs
    reference: Reference
    request: Request
    truth: Truth
    share: tuple[int, int]

    def climb(self, precision: str) -> Iterator[Row]:
        """Every rung in order, whether or not one before it broke."""
        limits = genai_limits_of(precision, self.graphs.manifest.pixels.resample)
        for rung in RUNGS:
            find = getattr(self, f"_{rung}")
            yield row_of(self.request.name, precision, rung, limits[rung], find)

    def _prompt_ids(self) -> Found:
        pairs = list(self._processed())
        wrong = sum(metrics.unequal(ours.prompt_ids, truth.ids) for ours, truth in pairs)
        return {"wrong": wrong}, None

    def _pixels(self) -> Found:
        wrong, largest = 0, 0.0
        for processed, truth in self._processed():
            ours = processed.inputs
            wrong += sum(metrics.unequal(ours[name], truth.pixels[name]) for name in truth.pixels)
            errors = (metrics.max_error(ours[name], truth.pixels[name]) for name in truth.pixels)
            largest = max(largest, *errors)
        levels = largest / self.reference.grey_level
        return {"wrong": wrong, "levels": levels}, f"{levels:.3g} grey levels" if wrong else None

    def _processed(self) -> Iterator[tuple[ProcessedImage, PictureTruth]]:
        """The bundle's side of each picture, and the reference's."""
        for picture, truth in zip(self.request.pictures, self.truth.pictures, strict=True):
            with bundle_runs():
                processed = self.graphs.process_image(picture.rgb, self.request.options)
            yield processed, truth

    def _vision_features(self) -> Found:
        """Of all pictures in one run, as the client has those of one size."""
        if not self.truth.pictures:
            return {"worst": 0.0, "typical": 0.0, "cosine": 1.0}, "no picture"
        with bundle_runs():
            ours = self.graphs.encode(_joined(self.truth.pixels))
        return closeness(ours, self.truth.features)

    def _merged_embeds(self) -> Found:
        """Text before and after the pictures: a share of the vocabulary, half on each side."""
        truth, (k, n) = self.truth, self.share
        token = self.graphs.manifest.prompt.image_token_id
        words = np.arange(k, self.reference.dims["vocab_size"], n)
        words = words[words != token]
        pictures = [picture.ids for picture in truth.pictures]
        ids = np.concatenate([words[::2], *pictures, words[1::2]])
        expected = self.reference.embeds(ids, truth.features)
        with bundle_runs():
            ours = self.graphs.embed(ids, truth.features if pictures else None)
        text = ids != token
        return {
            "wrong": metrics.unequal(ours, expected),
            "cosine": metrics.least_cosine(ours[text], expected[text]),
            "8 bits": metrics.rounding_steps(ours[text], expected[text], 8),
            "4 bits": metrics.rounding_steps(ours[text], expected[text], 4),
            "wrong features": metrics.unequal(ours[~text], expected[~text]),
        }, None

    def _position_ids(self) -> Found:
        truth = self.truth
        with bundle_runs():
            ours = self.graphs.positions(truth.prompt_ids, truth.pixels)
        expected = truth.position_ids[..., : len(truth.prompt_ids)]
        wrong = metrics.unequal(ours.ids, expected) + int(ours.offset != truth.offset)
        return {"wrong": wrong}, None

    def _first_logits(self) -> Found:
        """Those after the prompt."""
        P = len(self.truth.prompt_ids)
        with bundle_runs():
            ours = self._rows([0, P])
        return closeness(ours, self.truth.logits[P - 1 : P], tail=1)

    def _cached_decode(self) -> Found:
        """The prompt in two chunks, then token by token, against one pass of each side."""
        P, S = len(self.truth.prompt_ids), len(self.truth.ids)
        with bundle_runs():
            ours = self._rows(sorted({0, P // 2, *range(P, S + 1)}))[-(S - P + 1) :]
            whole = self._rows([0, S])
        values, _ = closeness(ours, self.truth.logits[P - 1 :], tail=len(ours))
        return values | {
            "self": metrics.worst_error(ours[-1:], whole),
            "self kl": metrics.mean_divergence(ours[-1:], whole),
        }, None

    def _rows(self, cuts: Sequence[int]) -> Float[np.ndarray, "n V"]:
        """The last row of each chunk of the truth's sequence."""
        truth, cache, rows = self.truth, None, []
        for start, stop in itertools.pairwise(cuts):
            embeds, positions = truth.embeds[start:stop], truth.position_ids[..., start:stop]
            row, cache = self.graphs.decode(embeds, positions, cache)
            rows.append(row)
        return np.stack(rows)

    def _greedy_tokens(self) -> Found:
        """A plain loop over embedding and decoder, from the reference's embeddings."""
        P, truth = len(self.truth.prompt_ids), self.truth
        positions = Positions(truth.position_ids[..., :P], truth.offset)
        return self._judge.stops(self._greedy(truth.embeds[:P], positions))

    def _end_to_end(self) -> Found:
        """From the pictures and messages to the tokens by the bundle alone."""
        graphs, options = self.graphs, self.request.options
        with bundle_runs():
            made = [graphs.process_image(one.rgb, options) for one in self.request.pictures]
            inputs = [processed.inputs for processed in made]
            features = graphs.encode(_joined(inputs)) if inputs else None
            ids = bundle_prompt(graphs.bundle, self.request, [one.prompt_ids for one in made])
            embeds, positions = graphs.embed(ids, features), graphs.positions(ids, inputs)
        found = self._judge.tokens(self._greedy(embeds, positions))
        return prompt_found(found, ids, self.truth.prompt_ids)

    def _greedy(self, embeds: Float[np.ndarray, "P D"], positions: Positions) -> list[int]:
        manifest = self.graphs.manifest
        stops, most = manifest.generation.stop_token_ids, max_new_tokens(manifest)
        with bundle_runs():
            return self.graphs.greedy(embeds, positions, most, stops)[0]

    @property
    def _judge(self) -> Judge:
        def logits(at: int) -> Float[np.ndarray, " V"]:
            return self._rows([0, len(self.truth.prompt_ids) + at])[0]

        return Judge(self.reference, self.truth, self.graphs.manifest, logits)


def _joined(pictures: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The vision encoder's inputs of all pictures, one below the other."""
    return {name: np.concatenate([one[name] for one in pictures]) for name in pictures[0]}


def run_genai_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request, one precision at a time.

    `progress` is told of each rung: how many are done, of how many, and what is next.
    """
    tell = progress or (lambda done, total, what: None)
    most = max_new_tokens(bundle.manifest)
    token = bundle.manifest.prompt.image_token_id
    truths = told_truths(requests, lambda one: Truth.of(reference, one, most, token), tell)

    @contextmanager
    def open_at(precision: str) -> Iterator[Climb]:
        graphs = GenaiGraphs.open(bundle, precision=precision)

        def climb(number: int) -> Iterator[Row]:
            share = (number, len(requests))
            ladder = GenaiLadder(graphs, reference, requests[number], truths[number], share)
            return ladder.climb(precision)

        yield climb
        graphs.close()

    return climb_all(precisions, requests, RUNGS, open_at, tell)
