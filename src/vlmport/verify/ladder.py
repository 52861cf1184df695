"""The ladder: nine comparisons from the pictures to the tokens.

Each rung gives the bundle what the *reference* made on the rung before, so that an error shows
on its own rung and nowhere else; only the last rung runs the bundle alone, from the pictures to
the tokens as a user gets them.

P prompt tokens, S prompt and new tokens, T image tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.bundle import Bundle
from vlmport.runtime.cache import KeyValueCache
from vlmport.runtime.components import Components, ProcessedImage, merge_image_features
from vlmport.runtime.generate import Generation
from vlmport.runtime.model import VLM
from vlmport.runtime.options import CHECKS, REFUSED, GenerationOptions
from vlmport.runtime.prompt import check_messages
from vlmport.runtime.request import new_request
from vlmport.verify import metrics
from vlmport.verify.judging import (
    Found,
    Judge,
    Progress,
    bundle_runs,
    max_new_tokens,
    row_of,
)
from vlmport.verify.limits import RUNGS, limits_of
from vlmport.verify.protocol import Reference
from vlmport.verify.report import Row
from vlmport.verify.requests import Request
from vlmport.verify.truth import PictureTruth, Truth

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Ladder:
    """The bundle's side at one precision, and the reference.

    Attributes:
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this request, so that n
            requests cover the whole table.
    """

    model: VLM
    reference: Reference
    request: Request
    truth: Truth
    share: tuple[int, int]

    @property
    def components(self) -> Components:
        return self.model.components

    def climb(self, precision: str) -> Iterator[Row]:
        """Every rung in order, whether or not one before it broke."""
        limits = limits_of(precision, self.components.manifest.pixels.resample)
        for rung in RUNGS:
            find = getattr(self, f"_{rung}")
            yield row_of(self.request.name, precision, rung, limits[rung], find)

    def _prompt_ids(self) -> Found:
        """The ids of each picture. Those of the text around them are the last rung's."""
        wrong, details = 0, []
        for processed, truth in self._processed():
            if unequal := metrics.unequal(processed.prompt_ids, truth.ids):
                wrong += unequal
                details.append(f"{len(processed.prompt_ids)} ids, expected {len(truth.ids)}")
        return {"wrong": wrong}, "; ".join(details) or None

    def _pixels(self) -> Found:
        """Grey levels tell a weight that was rounded to its neighbour from another filter."""
        wrong, largest = 0, 0.0
        for processed, picture in self._processed():
            ours, truth = processed.inputs, picture.pixels
            if absent := sorted(truth.keys() - ours.keys()):
                detail = f"the image processor has no {', '.join(absent)}"
                return {"wrong": float("inf"), "levels": float("inf")}, detail
            wrong += sum(metrics.unequal(ours[name], truth[name]) for name in truth)
            largest = max(largest, *(metrics.max_error(ours[name], truth[name]) for name in truth))
        levels = largest / self.reference.grey_level
        detail = f"largest difference {largest:.3g}, {levels:.3g} grey levels" if wrong else None
        return {"wrong": wrong, "levels": levels}, detail

    def _processed(self) -> Iterator[tuple[ProcessedImage, PictureTruth]]:
        """The bundle's side of each picture, and the reference's."""
        pairs = zip(self.request.pictures, self.truth.pictures, strict=True)
        for picture, truth in pairs:
            with bundle_runs():
                processed = self.components.process_image(picture.rgb, self.request.options)
            yield processed, truth

    def _vision_features(self) -> Found:
        worst, typical, cosine = [0.0], [0.0], [1.0]
        for picture in self.truth.pictures:
            with bundle_runs():
                ours = self.components.encode_image(picture.pixels)
            worst.append(metrics.worst_error(ours, picture.features))
            typical.append(metrics.typical_error(ours, picture.features))
            cosine.append(metrics.least_cosine(ours, picture.features))
        return {"worst": max(worst), "typical": max(typical), "cosine": min(cosine)}, None

    def _merged_embeds(self) -> Found:
        """Text before and after the pictures: a share of the vocabulary, half on each side."""
        truth, (k, n) = self.truth, self.share
        image_token_id = self.components.manifest.prompt.image_token_id
        words = np.arange(k, self.reference.dims["vocab_size"], n)
        words = words[words != image_token_id]
        pictures = [picture.ids for picture in truth.pictures]
        ids = np.concatenate([words[::2], *pictures, words[1::2]])
        expected = self.reference.embeds(ids, truth.features)
        with bundle_runs():
            embeds = self.components.embed(ids[None])[0]
            ours = merge_image_features(embeds, ids, truth.features, image_token_id)
        text = ids != image_token_id
        return {
            "wrong": metrics.unequal(ours, expected),
            "cosine": metrics.least_cosine(ours[text], expected[text]),
            "8 bits": metrics.rounding_steps(ours[text], expected[text], 8),
            "4 bits": metrics.rounding_steps(ours[text], expected[text], 4),
            "wrong features": metrics.unequal(ours[~text], expected[~text]),
        }, None

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
            "self": max(metrics.worst_error(ours, whole), metrics.worst_error(last, whole[-1:])),
            "self kl": max(
                metrics.mean_divergence(ours[first:], whole[first:]),
                metrics.mean_divergence(last, whole[-1:]),
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
        return self._judge.stops(request.tokens)

    def _end_to_end(self) -> Found:
        """From the pictures to the tokens as a user has them, but greedily whatever the bundle's
        defaults are. The prompt's text is compared here, id by id."""
        defaults = self.components.manifest.generation.defaults
        known = [name for name in defaults if name in CHECKS or name in REFUSED]
        options: dict[str, Any] = {**dict.fromkeys(known), "max_new_tokens": self.max_new_tokens}
        request, images = self.request, [picture.rgb for picture in self.request.pictures]
        self.model.features.options = request.options
        with bundle_runs():
            ids = self._prompt(images)
            if request.is_caption:
                answer = self.model.caption(images[0], **options)
            else:
                answer = self.model.generate(request.messages, images, **options)
        values, detail = self._judge.tokens(answer.token_ids)
        given, expected = answer.counts["prompt_tokens"], len(self.truth.prompt_ids)
        wrong = max(metrics.unequal(ids, self.truth.prompt_ids), abs(given - expected))
        if wrong:
            told = f"a prompt of {given} tokens, expected {expected}; {wrong} ids differ"
            detail = f"{told}; {detail}" if detail else told
        return values | {"prompt": wrong}, detail

    def _prompt(self, images: list[np.ndarray]) -> Int[np.ndarray, " S"]:
        """The ids of the prompt as the runtime puts it together."""
        asked = self.components.manifest.prompt.caption
        chat = check_messages(asked if self.request.is_caption else self.request.messages, images)
        prompter = self.model.prompter
        text = prompter.encode(prompter.render(chat.messages))
        return prompter.splice(
            text, [self.model.features.process(one).prompt_ids for one in images]
        )

    @property
    def max_new_tokens(self) -> int:
        return max_new_tokens(self.components.manifest)

    @property
    def _judge(self) -> Judge:
        def logits(at: int) -> Float[np.ndarray, " V"]:
            return self._decode(0, len(self.truth.prompt_ids) + at, keep=1)[0][-1]

        return Judge(self.reference, self.truth, self.components.manifest, logits)

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


def run_ladder(
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request.

    One precision at a time, so that beside the reference only its sessions are in memory.
    `progress` is told of each rung: how many are done, of how many, and what is next.
    """
    tell = progress or (lambda done, total, what: None)
    total = len(RUNGS) * len(requests) * len(precisions)
    manifest, rows = bundle.manifest, []
    truths = []
    for request in requests:
        tell(0, total, f"reference, {request.name}")
        most, image_token_id = max_new_tokens(manifest), manifest.prompt.image_token_id
        truths.append(Truth.of(reference, request, most, image_token_id))
    for precision in precisions:
        with VLM.open(bundle, precision=precision) as model:
            for number, (request, truth) in enumerate(zip(requests, truths, strict=True)):
                tell(len(rows), total, f"{precision}, {request.name}")
                ladder = Ladder(model, reference, request, truth, (number, len(requests)))
                for row in ladder.climb(precision):
                    rows.append(row)
                    tell(len(rows), total, f"{precision}, {request.name}")
    return tuple(rows)
