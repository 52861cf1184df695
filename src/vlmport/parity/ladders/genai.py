"""The ladder of the layout `genai`: its graphs, fed as onnxruntime-genai feeds them.

The rungs are the Hub's. What differs: the embedding's graph itself writes features over the image
tokens, the decoder gives logits of the last row alone, its cache grows, and what has the padding's
id in a prompt is masked. That the client itself says the same is a test's matter, which has it
installed.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.parity import metrics
from vlmport.parity.asked import Request
from vlmport.parity.judging import Found, Progress, bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Climber,
    Share,
    Tensors,
    climb_all,
    closeness,
    feature_figures,
    prompt_id_figures,
    prompt_of,
    truth_of,
)
from vlmport.parity.limits import RUNGS, Limit, genai_limits_of
from vlmport.parity.protocol import Reference
from vlmport.parity.report import Row
from vlmport.parity.truth import PictureTruth
from vlmport.runtime.graphs.image_processor import ProcessedImage
from vlmport.runtime.graphs.positions import Positions
from vlmport.runtime.layouts.genai import GenaiGraphs
from vlmport.runtime.prompt import Prompter

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class GenaiLadder(Climber[GenaiGraphs, Reference]):
    """The ladder of onnxruntime-genai's graphs."""

    rungs = RUNGS

    @property
    def manifest(self) -> Manifest:
        return self.runtime.manifest

    def limits(self, precision: str) -> Mapping[str, Mapping[str, Limit]]:
        return genai_limits_of(precision, self.manifest.pixels.resample)

    def _prompt_ids(self) -> Found:
        return prompt_id_figures(self._processed())

    def _pixels(self) -> Found:
        return self.pixel_figures((ours.inputs, truth.pixels) for ours, truth in self._processed())

    def _processed(self) -> Iterator[tuple[ProcessedImage, PictureTruth]]:
        return self.processed(self.runtime.process_image)

    def _vision_features(self) -> Found:
        """Of all pictures in one run, as the client has those of one size."""
        if not self.truth.pictures:
            return feature_figures([])
        with bundle_runs():
            ours = self.runtime.encode(_joined(self.truth.pixels))
        return feature_figures([(ours, self.truth.features)])

    def _merged_embeds(self) -> Found:
        """As the graph merges them."""
        features = self.truth.features if self.truth.pictures else None

        def merge(ids: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S D"]:
            return self.runtime.embed(ids, features)

        return self.merged_figures(merge)

    def _position_ids(self) -> Found:
        truth = self.truth
        with bundle_runs():
            ours = self.runtime.positions(truth.prompt_ids, truth.pixels)
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
            ours = self._rows(sorted({0, P // 2, *range(P, S + 1)}))[-self.tail :]
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
            row, cache = self.runtime.decode(embeds, positions, cache, truth.prompt_ids)
            rows.append(row)
        return np.stack(rows)

    def _greedy_tokens(self) -> Found:
        """A plain loop over embedding and decoder, from the reference's embeddings."""
        P, truth = len(self.truth.prompt_ids), self.truth
        positions = Positions(truth.position_ids[..., :P], truth.offset)
        return self.judge.stops(self._greedy(truth.embeds[:P], positions))

    def _end_to_end(self) -> Found:
        """From the pictures and messages to the tokens by the bundle alone."""
        with bundle_runs():
            tokens, ids = alone(self.runtime, self.request)
        return self.prompt_found(self.judge.tokens(tokens), ids)

    def _greedy(self, embeds: Float[np.ndarray, "P D"], positions: Positions) -> list[int]:
        with bundle_runs():
            return greedy(self.runtime, embeds, positions, self.truth.prompt_ids)

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        return self._rows([0, len(self.truth.prompt_ids) + at])[0]


def alone(graphs: GenaiGraphs, request: Request) -> tuple[list[int], Int[np.ndarray, " P"]]:
    """From pictures and messages to the tokens; and the prompt's ids. Raises as the bundle does."""
    made = [graphs.process_image(one.rgb, request.options) for one in request.pictures]
    inputs = [processed.inputs for processed in made]
    features = graphs.encode(_joined(inputs)) if inputs else None
    prompter = Prompter(graphs.bundle.folder, graphs.manifest.prompt)
    pictures = [one.prompt_ids for one in made]
    ids = prompt_of(request, graphs.manifest, prompter, pictures)
    embeds, positions = graphs.embed(ids, features), graphs.positions(ids, inputs)
    return greedy(graphs, embeds, positions, ids), ids


def greedy(
    graphs: GenaiGraphs,
    embeds: Float[np.ndarray, "P D"],
    positions: Positions,
    ids: Int[np.ndarray, " P"],
) -> list[int]:
    """The tokens after a prompt, as many as the bundle makes at most."""
    manifest = graphs.manifest
    stops = manifest.generation.stop_token_ids
    most = max_new_tokens(manifest)
    return graphs.greedy(embeds, positions, most, stops, prompt_ids=ids)[0]


def _joined(pictures: Sequence[Tensors]) -> dict[str, np.ndarray]:
    """The vision encoder's inputs of all pictures, one below the other."""
    return {name: np.concatenate([one[name] for one in pictures]) for name in pictures[0]}


def run_genai_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request.

    `progress` is told of each rung: how many are done, of how many, and what is next.
    """

    def prepare(request: Request, share: Share) -> Callable[[GenaiGraphs], GenaiLadder]:
        truth = truth_of(reference, bundle.manifest, request)
        return lambda graphs: GenaiLadder(graphs, reference, request, truth, share)

    def open_at(precision: str) -> GenaiGraphs:
        return GenaiGraphs.open(bundle, precision=precision)

    return climb_all(GenaiLadder.rungs, precisions, requests, prepare, open_at, alone, progress)
