"""Climb from the image to the tokens through the graphs of the layout `genai`.

The graphs are fed as onnxruntime-genai feeds them. The rungs are the Hub's, with these differences:
the embedding's graph itself writes features over the image tokens, the decoder gives the logits of
the last row alone, its cache grows, and a prompt's tokens with the id of the padding are masked. A
test that has the client installed proves that the client itself gives the same.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.layouts import GENAI
from vlmport.parity import limits, metrics
from vlmport.parity.asked import Request
from vlmport.parity.judging import bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Answer,
    ProcessorLadder,
    Tensors,
    closeness,
    feature_figures,
    prompt_of,
)
from vlmport.parity.protocol import Reference
from vlmport.parity.rungs import Found, Rung
from vlmport.runtime.graphs.image_processor import ProcessedImage
from vlmport.runtime.graphs.positions import Positions
from vlmport.runtime.layouts.genai import GenaiGraphs
from vlmport.runtime.prompt import Prompter

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class GenaiLadder(ProcessorLadder[GenaiGraphs, Reference]):
    """Compare the graphs of onnxruntime-genai with the reference."""

    layout = GENAI

    @classmethod
    def open(cls, bundle: Bundle, precision: str) -> GenaiGraphs:
        return GenaiGraphs.open(bundle, precision=precision)

    @staticmethod
    def alone(runtime: GenaiGraphs, request: Request) -> Answer:
        made = [runtime.process_image(one.rgb, request.options) for one in request.pictures]
        inputs = [processed.inputs for processed in made]
        features = runtime.encode(_joined(inputs)) if inputs else None
        prompter = Prompter(runtime.bundle.folder, runtime.manifest.prompt)
        pictures = [one.prompt_ids for one in made]
        ids = prompt_of(request, runtime.manifest, prompter, pictures)
        embeds, positions = runtime.embed(ids, features), runtime.positions(ids, inputs)
        return Answer(greedy(runtime, embeds, positions, ids), ids)

    @property
    def manifest(self) -> Manifest:
        return self.runtime.manifest

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        return self._rows([0, len(self.truth.prompt_ids) + at])[0]

    def process_image(self, rgb: np.ndarray, options: Mapping[str, Any]) -> ProcessedImage:
        return self.runtime.process_image(rgb, options)

    def vision_features(self) -> Found:
        """Compare the features of all images, encoded in one run as the client does it."""
        if not self.truth.pictures:
            return feature_figures([])
        with bundle_runs():
            ours = self.runtime.encode(_joined(self.truth.pixels))
        return feature_figures([(ours, self.truth.features)])

    def merged_embeds(self) -> Found:
        """Compare embeddings of text and images, as the graph merges them."""
        features = self.truth.features if self.truth.pictures else None

        def merge(ids: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S D"]:
            return self.runtime.embed(ids, features)

        return self.merged_figures(merge)

    def position_ids(self) -> Found:
        """Compare the positions of the prompt, and that of the first new token."""
        truth = self.truth
        with bundle_runs():
            ours = self.runtime.positions(truth.prompt_ids, truth.pixels)
        expected = truth.position_ids[..., : len(truth.prompt_ids)]
        wrong = metrics.unequal(ours.ids, expected) + int(ours.rope_delta != truth.offset)
        return {"wrong": wrong}, None

    def first_logits(self) -> Found:
        """Compare the one row of logits after the prompt."""
        P = len(self.truth.prompt_ids)
        with bundle_runs():
            ours = self._rows([0, P])
        return closeness(ours, self.truth.logits[P - 1 : P], tail=1)

    def cached_decode(self) -> Found:
        """Feed the prompt in two chunks, then token by token; compare with one pass of each
        side."""
        P, S = len(self.truth.prompt_ids), len(self.truth.ids)
        with bundle_runs():
            ours = self._rows(sorted({0, P // 2, *range(P, S + 1)}))[-self.tail :]
            whole = self._rows([0, S])
        values, _ = closeness(ours, self.truth.logits[P - 1 :], tail=len(ours))
        return values | {
            "self": metrics.worst_error(ours[-1:], whole),
            "self kl": metrics.mean_divergence(ours[-1:], whole),
        }, None

    def greedy_tokens(self) -> Found:
        """Judge the tokens of a plain loop over embedding and decoder, from the reference's
        embeddings."""
        P, truth = len(self.truth.prompt_ids), self.truth
        positions = Positions(truth.position_ids[..., :P], truth.offset)
        with bundle_runs():
            tokens = greedy(self.runtime, truth.embeds[:P], positions, truth.prompt_ids)
        return self.judge.stops(tokens)

    def _rows(self, cuts: Sequence[int]) -> Float[np.ndarray, "n V"]:
        """Decode the truth's sequence in chunks; return the last row of logits of each."""
        truth, cache, rows = self.truth, None, []
        for start, stop in itertools.pairwise(cuts):
            embeds, positions = truth.embeds[start:stop], truth.position_ids[..., start:stop]
            row, cache = self.runtime.decode(embeds, positions, cache, truth.prompt_ids)
            rows.append(row)
        return np.stack(rows)

    rungs = (
        Rung("prompt_ids", ProcessorLadder.prompt_ids, limits.PROMPT_IDS),
        Rung("pixels", ProcessorLadder.pixels, limits.PIXELS),
        Rung("vision_features", vision_features, limits.FEATURES),
        Rung("merged_embeds", merged_embeds, limits.MERGED_EMBEDS),
        Rung("position_ids", position_ids, limits.POSITION_IDS),
        Rung("first_logits", first_logits, limits.LAST_LOGITS),
        Rung("cached_decode", cached_decode, limits.GROWING_CACHE),
        Rung("greedy_tokens", greedy_tokens, limits.GREEDY_TOKENS),
        Rung("end_to_end", ProcessorLadder.end_to_end, limits.END_TO_END),
    )


def greedy(
    graphs: GenaiGraphs,
    embeds: Float[np.ndarray, "P D"],
    positions: Positions,
    ids: Int[np.ndarray, " P"],
) -> list[int]:
    """Generate the tokens after a prompt, up to the bundle's maximum."""
    manifest = graphs.manifest
    stops = manifest.generation.stop_token_ids
    most = max_new_tokens(manifest)
    return graphs.greedy(embeds, positions, most, stops, prompt_ids=ids)[0]


def _joined(pictures: Sequence[Tensors]) -> dict[str, np.ndarray]:
    """Concatenate the vision encoder's inputs of all images."""
    return {name: np.concatenate([one[name] for one in pictures]) for name in pictures[0]}
