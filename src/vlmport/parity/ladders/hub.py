"""Climb from the image to the tokens in nine comparisons, for the layout that the runtime runs.

Each rung gives the bundle what the *reference* made on the rung before, so that an error shows on
its own rung and nowhere else. Only the last rung runs the bundle alone, from images and messages to
the tokens that a user gets.

P prompt tokens, S prompt and new tokens, T image tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.layouts import HUB
from vlmport.parity import limits, metrics
from vlmport.parity.asked import Request
from vlmport.parity.judging import bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import Answer, ProcessorLadder, feature_figures, prompt_of
from vlmport.parity.protocol import Reference
from vlmport.parity.rungs import Found, Rung
from vlmport.runtime.decoding.options import CHECKS, REFUSED, GenerationOptions
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components, ProcessedImage, merge_image_features
from vlmport.runtime.model import VLM
from vlmport.runtime.request import new_request

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class HubLadder(ProcessorLadder[VLM, Reference]):
    """Compare the Hub's layout, as the runtime runs it, with the reference."""

    layout = HUB

    @classmethod
    def open(cls, bundle: Bundle, precision: str) -> VLM:
        return VLM.open(bundle, precision=precision)

    @staticmethod
    def alone(runtime: VLM, request: Request) -> Answer:
        """Answer greedily, whatever the bundle's defaults are."""
        manifest, features = runtime.components.manifest, runtime.features
        known = [one for one in manifest.generation.defaults if one in CHECKS or one in REFUSED]
        options: dict[str, Any] = dict.fromkeys(known)
        options["max_new_tokens"] = max_new_tokens(manifest)
        images, image_options = [picture.rgb for picture in request.pictures], request.options
        if request.is_caption:
            answer = runtime.caption(images[0], image_options=image_options, **options)
        else:
            answer = runtime.generate(
                request.messages, images, image_options=image_options, **options
            )
        pictures = [features.process(image, image_options).prompt_ids for image in images]
        ids = prompt_of(request, manifest, runtime.prompter, pictures)
        return Answer(answer.token_ids, ids, answer.counts["prompt_tokens"])

    @property
    def components(self) -> Components:
        return self.runtime.components

    @property
    def manifest(self) -> Manifest:
        return self.components.manifest

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        return self._decode(0, len(self.truth.prompt_ids) + at, keep=1)[0][-1]

    def process_image(self, rgb: np.ndarray, options: Mapping[str, Any]) -> ProcessedImage:
        return self.components.process_image(rgb, options)

    def vision_features(self) -> Found:
        """Compare the features of each image, encoded by itself."""
        return feature_figures(self._encoded())

    def _encoded(self) -> Iterator[tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]]:
        for picture in self.truth.pictures:
            with bundle_runs():
                ours = self.components.encode_image(picture.pixels)
            yield ours, picture.features

    def merged_embeds(self) -> Found:
        """Compare embeddings of text and images, as the runtime merges them."""
        features, token = self.truth.features, self.manifest.prompt.image_token_id

        def merge(ids: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S D"]:
            return merge_image_features(self.components.embed(ids[None])[0], ids, features, token)

        return self.merged_figures(merge)

    def position_ids(self) -> Found:
        """Compare the positions of the prompt, of the prompt with the answer after it, and of the
        first new token. Later steps count on from there, which `cached_decode` sees."""
        truth, P = self.truth, len(self.truth.prompt_ids)
        with bundle_runs():
            whole = self.components.position_ids(truth.ids, truth.pixels)
            prompt = self.components.position_ids(truth.prompt_ids, truth.pixels)
        wrong = metrics.unequal(whole.ids, truth.position_ids)
        wrong += metrics.unequal(prompt.ids, truth.position_ids[..., :P])
        if prompt.rope_delta == truth.offset:
            return {"wrong": wrong}, None
        detail = f"the next position is {P + prompt.rope_delta}, expected {P + truth.offset}"
        return {"wrong": wrong + 1}, detail

    def first_logits(self) -> Found:
        """Compare one pass without a cache.

        KL and agreement count only where a token is predicted: at the prompt's last position and at
        the reference's tokens after it.
        """
        with bundle_runs():
            ours, _ = self._decode(0, len(self.truth.ids))
        truth, first = self.truth.logits, len(self.truth.prompt_ids) - 1
        return {
            "worst": metrics.worst_error(ours, truth),
            "typical": metrics.typical_error(ours, truth),
            "kl": metrics.mean_divergence(ours[first:], truth[first:]),
            "top1": metrics.agreement(ours[first:], truth[first:]),
        }, None

    def cached_decode(self) -> Found:
        """Feed the prompt in two chunks, then token by token, with a cache that grows and with the
        runtime's own; compare with one pass of each side."""
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
        """Decode with the graph alone: each pass is fed the presents of the one before."""
        P, S = len(self.truth.prompt_ids), len(self.truth.ids)
        past, parts = None, []
        for start, stop in itertools.pairwise(sorted({0, P // 2, *range(P, S + 1)})):
            logits, past = self._decode(start, stop, past)
            parts.append(logits)
        return np.concatenate(parts)

    def _bound_decode(self) -> Float[np.ndarray, "S V"]:
        """Decode with the runtime's cache, as the middle one of three rows of unequal lengths that
        step together. The cache counts the positions of the steps, and its buffers grow."""
        truth, P, S = self.truth, len(self.truth.prompt_ids), len(self.truth.ids)
        limit = self.components.manifest.dims.context_length
        cache = KeyValueCache(self.components.decoder, rows=3, capacity=P + 1, limit=limit)
        cache.rope_deltas[1] = truth.offset
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

    def greedy_tokens(self) -> Found:
        """Judge the tokens of the runtime's own loop, from the reference's embeddings."""
        P = len(self.truth.prompt_ids)
        with bundle_runs():
            request = new_request(
                self.components,
                self.truth.embeds[:P],
                GenerationOptions(max_new_tokens=self.max_new_tokens),
                positions=self.truth.position_ids[..., :P],
                rope_delta=self.truth.offset,
            )
            Generation(self.components, [request]).run()
        return self.judge.stops(request.tokens)

    def _decode(
        self, start: int, stop: int, past: Mapping[str, np.ndarray] | None = None, keep: int = 0
    ) -> tuple[Float[np.ndarray, "n V"], dict[str, np.ndarray]]:
        """Decode rows start … stop of the truth's embeddings, after a cache of `start` tokens."""
        logits, presents = self.components.decode(
            self.truth.embeds[None, start:stop],
            np.ones((1, stop), np.int64),
            self.truth.position_ids[..., None, start:stop],
            past,
            num_logits_to_keep=keep,
        )
        return logits[0], presents

    rungs = (
        Rung("prompt_ids", ProcessorLadder.prompt_ids, limits.PROMPT_IDS),
        Rung("pixels", ProcessorLadder.pixels, limits.PIXELS),
        Rung("vision_features", vision_features, limits.FEATURES),
        Rung("merged_embeds", merged_embeds, limits.MERGED_EMBEDS),
        Rung("position_ids", position_ids, limits.POSITION_IDS),
        Rung("first_logits", first_logits, limits.LOGITS),
        Rung("cached_decode", cached_decode, limits.CACHED_DECODE),
        Rung("greedy_tokens", greedy_tokens, limits.GREEDY_TOKENS),
        Rung("end_to_end", ProcessorLadder.end_to_end, limits.END_TO_END),
    )
