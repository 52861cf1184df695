"""The ladder: nine comparisons from the pictures to the tokens.

Each rung gives the bundle what the *reference* made on the rung before, so that an error shows
on its own rung and nowhere else; only the last rung runs the bundle alone, from the pictures to
the tokens as a user gets them.

P prompt tokens, S prompt and new tokens, T image tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.parity import metrics
from vlmport.parity.asked import Request
from vlmport.parity.judging import Found, Progress, bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Climber,
    Share,
    climb_all,
    feature_figures,
    prompt_id_figures,
    prompt_of,
    truth_of,
)
from vlmport.parity.limits import RUNGS, Limit, limits_of
from vlmport.parity.protocol import Reference
from vlmport.parity.report import Row
from vlmport.parity.truth import PictureTruth
from vlmport.runtime.decoding.options import CHECKS, REFUSED, GenerationOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components, ProcessedImage, merge_image_features
from vlmport.runtime.model import VLM
from vlmport.runtime.request import new_request

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from vlmport.runtime.response import Response


@dataclass(frozen=True)
class Ladder(Climber[VLM, Reference]):
    """The ladder of the Hub's layout, which the runtime itself runs."""

    rungs = RUNGS

    @property
    def components(self) -> Components:
        return self.runtime.components

    @property
    def manifest(self) -> Manifest:
        return self.components.manifest

    def limits(self, precision: str) -> Mapping[str, Mapping[str, Limit]]:
        return limits_of(precision, self.manifest.pixels.resample)

    def _prompt_ids(self) -> Found:
        return prompt_id_figures(self._processed())

    def _pixels(self) -> Found:
        return self.pixel_figures((ours.inputs, truth.pixels) for ours, truth in self._processed())

    def _processed(self) -> Iterator[tuple[ProcessedImage, PictureTruth]]:
        return self.processed(self.components.process_image)

    def _vision_features(self) -> Found:
        """Of each picture by itself."""
        return feature_figures(self._encoded())

    def _encoded(self) -> Iterator[tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]]:
        for picture in self.truth.pictures:
            with bundle_runs():
                ours = self.components.encode_image(picture.pixels)
            yield ours, picture.features

    def _merged_embeds(self) -> Found:
        """As the runtime merges them."""
        features, token = self.truth.features, self.manifest.prompt.image_token_id

        def merge(ids: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S D"]:
            return merge_image_features(self.components.embed(ids[None])[0], ids, features, token)

        return self.merged_figures(merge)

    def _position_ids(self) -> Found:
        """Of a prompt that ends with the picture, and of one with text after it; and where the
        first new token stands. Steps count on from there: the next rungs but one see that."""
        truth, P = self.truth, len(self.truth.prompt_ids)
        with bundle_runs():
            whole = self.components.position_ids(truth.ids, truth.pixels)
            prompt = self.components.position_ids(truth.prompt_ids, truth.pixels)
        wrong = metrics.unequal(whole.ids, truth.position_ids)
        wrong += metrics.unequal(prompt.ids, truth.position_ids[..., :P])
        if prompt.offset == truth.offset:
            return {"wrong": wrong}, None
        detail = f"the next position is {P + prompt.offset}, expected {P + truth.offset}"
        return {"wrong": wrong + 1}, detail

    def _first_logits(self) -> Found:
        """One pass without a cache. KL and agreement where a token is predicted: at the prompt's
        last position and at the reference's tokens after it; before, nobody asks."""
        with bundle_runs():
            ours, _ = self._decode(0, len(self.truth.ids))
        truth, first = self.truth.logits, len(self.truth.prompt_ids) - 1
        return {
            "worst": metrics.worst_error(ours, truth),
            "typical": metrics.typical_error(ours, truth),
            "kl": metrics.mean_divergence(ours[first:], truth[first:]),
            "top1": metrics.agreement(ours[first:], truth[first:]),
        }, None

    def _cached_decode(self) -> Found:
        """The prompt in two chunks, then token by token, with a cache that grows and with the
        runtime's own, against one pass of each side."""
        S, truth, first = len(self.truth.ids), self.truth.logits, len(self.truth.prompt_ids) - 1
        with bundle_runs():
            ours, bound = self._grown_decode(), self._bound_decode()
            whole, _ = self._decode(0, S)
            last, _ = self._decode(0, S, keep=1)
        return {
            "worst": metrics.worst_error(ours, truth),
            "typical": metrics.typical_error(ours, truth),
            "bound": metrics.worst_error(bound, truth),
            "self": metrics.largest(
                [metrics.worst_error(ours, whole), metrics.worst_error(last, whole[-1:])]
            ),
            "self kl": metrics.largest(
                [
                    metrics.mean_divergence(ours[first:], whole[first:]),
                    metrics.mean_divergence(last, whole[-1:]),
                ]
            ),
            "bound kl": metrics.mean_divergence(bound[first:], whole[first:]),
            "kl": metrics.mean_divergence(ours[first:], truth[first:]),
        }, None

    def _grown_decode(self) -> Float[np.ndarray, "S V"]:
        """By the graph's plain form: each pass is fed the presents of the one before."""
        P, S = len(self.truth.prompt_ids), len(self.truth.ids)
        past, parts = None, []
        for start, stop in itertools.pairwise(sorted({0, P // 2, *range(P, S + 1)})):
            logits, past = self._decode(start, stop, past)
            parts.append(logits)
        return np.concatenate(parts)

    def _bound_decode(self) -> Float[np.ndarray, "S V"]:
        """By the cache that ships: the middle one of three rows of unequal lengths, which step
        together; positions of steps are the cache's own. Its buffers grow on the way."""
        truth, P, S = self.truth, len(self.truth.prompt_ids), len(self.truth.ids)
        limit = self.components.manifest.dims.context_length
        cache = KeyValueCache(self.components.decoder, rows=3, capacity=P + 1, limit=limit)
        cache.offsets[1] = truth.offset
        cache.prefill(0, truth.embeds[: (P + 1) // 2])
        cache.prefill(2, truth.embeds[:P])
        parts = []
        for start, stop in itertools.pairwise(sorted({0, P // 2, P})):
            positions = truth.position_ids[..., start:stop]
            parts.append(cache.prefill(1, truth.embeds[start:stop], positions, keep=0))
        for at in range(P, S):
            logits = cache.step(np.repeat(truth.embeds[None, at : at + 1], 3, axis=0))
            parts.append(logits[1:2].copy())
        return np.concatenate(parts)

    def _greedy_tokens(self) -> Found:
        """The runtime's own loop, fed the reference's embeddings of the prompt."""
        P = len(self.truth.prompt_ids)
        with bundle_runs():
            request = new_request(
                self.components,
                self.truth.embeds[:P],
                GenerationOptions(max_new_tokens=self.max_new_tokens),
                positions=self.truth.position_ids[..., :P],
                offset=self.truth.offset,
            )
            Generation(self.components, [request]).run()
        return self.judge.stops(request.tokens)

    def _end_to_end(self) -> Found:
        """From the pictures to the tokens as a user has them. The prompt's text is compared here,
        id by id."""
        request = self.request
        with bundle_runs():
            answer = alone(self.runtime, request)
            features = self.runtime.features
            pictures = [features.process(picture.rgb).prompt_ids for picture in request.pictures]
            ids = prompt_of(request, self.manifest, self.runtime.prompter, pictures)
        found = self.judge.tokens(answer.token_ids)
        return self.prompt_found(found, ids, answer.counts["prompt_tokens"])

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        return self._decode(0, len(self.truth.prompt_ids) + at, keep=1)[0][-1]

    def _decode(
        self, start: int, stop: int, past: Mapping[str, np.ndarray] | None = None, keep: int = 0
    ) -> tuple[Float[np.ndarray, "n V"], dict[str, np.ndarray]]:
        """Rows start … stop of the truth's embeddings, after a cache of `start` tokens."""
        logits, presents = self.components.decode(
            self.truth.embeds[None, start:stop],
            np.ones((1, stop), np.int64),
            self.truth.position_ids[..., None, start:stop],
            past,
            num_logits_to_keep=keep,
        )
        return logits[0], presents


def alone(model: VLM, request: Request) -> Response:
    """From pictures and messages to the tokens, greedily whatever the bundle's defaults are.

    Raises as the runtime does.
    """
    manifest = model.components.manifest
    known = [one for one in manifest.generation.defaults if one in CHECKS or one in REFUSED]
    options: dict[str, Any] = {**dict.fromkeys(known), "max_new_tokens": max_new_tokens(manifest)}
    images = [picture.rgb for picture in request.pictures]
    model.features.options = request.options
    if request.is_caption:
        return model.caption(images[0], **options)
    return model.generate(request.messages, images, **options)


def run_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request.

    `progress` is told of each rung: how many are done, of how many, and what is next.
    """

    def prepare(request: Request, share: Share) -> Callable[[VLM], Ladder]:
        truth = truth_of(reference, bundle.manifest, request)
        return lambda model: Ladder(model, reference, request, truth, share)

    def open_at(precision: str) -> VLM:
        return VLM.open(bundle, precision=precision)

    return climb_all(Ladder.rungs, precisions, requests, prepare, open_at, alone, progress)
