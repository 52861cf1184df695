"""The ladder: nine comparisons from the picture to the tokens.

Each rung gives the bundle what the *reference* made on the rung before, so that an error shows
on its own rung and nowhere else; only the last rung runs the bundle alone, from the picture to
the tokens as a user gets them.

P prompt tokens, S prompt and new tokens, T image tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Manifest
from vlmport.errors import VlmportError
from vlmport.runtime import generate
from vlmport.runtime.components import Components, merge_image_features
from vlmport.runtime.model import VLM
from vlmport.runtime.sessions import ORT_ERRORS
from vlmport.verify import metrics
from vlmport.verify.limits import RUNGS, limits_of
from vlmport.verify.pictures import Picture
from vlmport.verify.protocol import Generated, Reference
from vlmport.verify.report import Measure, Row

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MAX_NEW_TOKENS = 32
Found = tuple[dict[str, float], str | None]  # measures, and a detail for the reader


@dataclass(frozen=True)
class Truth:
    """What the reference makes of one picture, from the bottom rung to the top.

    Attributes:
        prompt_ids, pixels, features: of the picture alone.
        made: greedy tokens and their logits.
        ids: prompt_ids and all new tokens but the last, which is never fed back.
        embeds, position_ids, logits: of ids.
    """

    prompt_ids: Int[np.ndarray, " P"]
    pixels: Mapping[str, np.ndarray]
    features: Float[np.ndarray, "T D"]
    made: Generated
    ids: Int[np.ndarray, " S"]
    embeds: Float[np.ndarray, "S D"]
    position_ids: Int[np.ndarray, "... S"]
    logits: Float[np.ndarray, "S V"]

    @classmethod
    def of(
        cls, reference: Reference, picture: Picture, max_new_tokens: int, image_token_id: int
    ) -> Truth:
        """Run the reference from the picture to the tokens, then once over all of them.

        An image token that the model itself says can't be fed back: the tokens end there.
        """
        prompt_ids = reference.prompt_ids(picture.image)
        pixels = reference.pixels(picture.image)
        features = reference.vision_features(pixels)
        made = reference.generate(reference.embeds(prompt_ids, features), max_new_tokens)
        if image_token_id in made.tokens:
            end = made.tokens.tolist().index(image_token_id) + 1
            made = Generated(made.tokens[:end], made.logits[:end])
        ids = np.concatenate([prompt_ids, made.tokens[:-1]])
        embeds, positions = reference.embeds(ids, features), reference.position_ids(ids)
        logits = reference.logits(embeds, positions)
        return cls(prompt_ids, pixels, features, made, ids, embeds, positions, logits)


@dataclass(frozen=True)
class Ladder:
    """The bundle's side at one precision, and the reference.

    Attributes:
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this picture, so that n
            pictures cover the whole table.
    """

    model: VLM
    reference: Reference
    picture: Picture
    truth: Truth
    share: tuple[int, int]

    @property
    def components(self) -> Components:
        return self.model.components

    def climb(self, precision: str) -> Iterator[Row]:
        """Every rung in order, whether or not one before it broke."""
        limits = limits_of(precision)
        for rung in RUNGS:
            try:
                values, detail = getattr(self, f"_{rung}")()
            except (VlmportError, *ORT_ERRORS) as error:  # then that is the finding
                text = f"{type(error).__name__}: {error}"
                yield Row(self.picture.name, precision, rung, (), error=text)
                continue
            measures = tuple(
                Measure(name, values[name], limit) for name, limit in limits[rung].items()
            )
            yield Row(self.picture.name, precision, rung, measures, detail=detail)

    def _prompt_ids(self) -> Found:
        ours = self.components.process_image(self.picture.rgb).prompt_ids
        wrong = metrics.unequal(ours, self.truth.prompt_ids)
        detail = f"{len(ours)} ids, expected {len(self.truth.prompt_ids)}" if wrong else None
        return {"wrong": wrong}, detail

    def _pixels(self) -> Found:
        ours, truth = self.components.process_image(self.picture.rgb).inputs, self.truth.pixels
        absent = sorted(truth.keys() - ours.keys())
        if absent:
            return {"wrong": float("inf")}, f"the image processor has no {', '.join(absent)}"
        wrong = sum(metrics.unequal(ours[name], truth[name]) for name in truth)
        error = max(metrics.max_error(ours[name], truth[name]) for name in truth)
        return {"wrong": wrong}, f"largest difference {error:.3g}" if wrong else None

    def _vision_features(self) -> Found:
        ours, truth = self.components.encode_image(self.truth.pixels), self.truth.features
        return {
            "worst": metrics.worst_error(ours, truth),
            "typical": metrics.typical_error(ours, truth),
            "cosine": metrics.least_cosine(ours, truth),
        }, None

    def _merged_embeds(self) -> Found:
        """Text before and after the picture: a share of the vocabulary, half on each side."""
        truth, (k, n) = self.truth, self.share
        image_token_id = self.components.manifest.prompt.image_token_id
        words = np.arange(k, self.reference.dims["vocab_size"], n)
        words = words[words != image_token_id]
        ids = np.concatenate([words[::2], truth.prompt_ids, words[1::2]])
        expected = self.reference.embeds(ids, truth.features)
        embeds = self.components.embed(ids[None])[0]
        ours = merge_image_features(embeds, ids, truth.features, image_token_id)
        text = ids != image_token_id
        return {
            "wrong": metrics.unequal(ours, expected),
            "cosine": metrics.least_cosine(ours[text], expected[text]),
            "wrong features": metrics.unequal(ours[~text], expected[~text]),
        }, None

    def _position_ids(self) -> Found:
        """At once, and in two parts as prefill and decode ask for them."""
        ids, P = self.truth.ids, len(self.truth.prompt_ids)
        whole = self.components.position_ids(ids)
        parts = [self.components.position_ids(ids[:P])]
        if len(ids) > P:
            parts.append(self.components.position_ids(ids[P:], past=P))
        wrong = metrics.unequal(whole, self.truth.position_ids)
        wrong += metrics.unequal(np.concatenate(parts, axis=-1), self.truth.position_ids)
        return {"wrong": wrong}, None

    def _first_logits(self) -> Found:
        """One pass without a cache. KL and agreement where a token is predicted: at the prompt's
        last position and at the reference's tokens after it; before, nobody asks."""
        ours, _ = self._decode(0, len(self.truth.ids))
        truth, first = self.truth.logits, len(self.truth.prompt_ids) - 1
        return {
            "worst": metrics.worst_error(ours, truth),
            "typical": metrics.typical_error(ours, truth),
            "kl": metrics.mean_divergence(ours[first:], truth[first:]),
            "top1": metrics.agreement(ours[first:], truth[first:]),
        }, None

    def _cached_decode(self) -> Found:
        """The prompt in two chunks, then token by token, against one pass of each side."""
        P, S = len(self.truth.prompt_ids), len(self.truth.ids)
        cuts = [0, P // 2, *range(P, S + 1)]
        past, parts = None, []
        for start, stop in itertools.pairwise(cuts):
            logits, past = self._decode(start, stop, past)
            parts.append(logits)
        ours = np.concatenate(parts)
        whole, _ = self._decode(0, S)
        last, _ = self._decode(0, S, keep=1)
        truth = self.truth.logits
        return {
            "worst": metrics.worst_error(ours, truth),
            "typical": metrics.typical_error(ours, truth),
            "self": max(metrics.worst_error(ours, whole), metrics.worst_error(last, whole[-1:])),
            "self kl": max(
                metrics.mean_divergence(ours[P - 1 :], whole[P - 1 :]),
                metrics.mean_divergence(last, whole[-1:]),
            ),
            "kl": metrics.mean_divergence(ours[P - 1 :], truth[P - 1 :]),
        }, None

    def _greedy_tokens(self) -> Found:
        """The runtime's own loop, fed the reference's embeddings of the prompt."""
        P = len(self.truth.prompt_ids)
        row = generate.Row(
            self.truth.embeds[:P],
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=frozenset(self.components.manifest.generation.stop_token_ids),
            positions=self.truth.position_ids[..., :P],
        )
        generate.Generation(self.components, [row]).run()
        return self._judge(np.asarray(row.tokens, np.int64))

    def _end_to_end(self) -> Found:
        """The picture through the runtime, as `vlmport caption` runs it."""
        caption = self.model.caption(self.picture.rgb, max_new_tokens=self.max_new_tokens)
        return self._judge(np.asarray(caption.token_ids, np.int64))

    @property
    def max_new_tokens(self) -> int:
        return max_new_tokens(self.components.manifest)

    def _judge(self, tokens: Int[np.ndarray, " N"]) -> Found:
        """Tokens against the reference's, and what the reference thinks of them."""
        truth = self.truth
        wrong = _wrong_tokens(tokens, truth.made.tokens)
        logits = truth.logits
        if wrong:
            ids = np.concatenate([truth.prompt_ids, tokens[:-1]])
            embeds = self.reference.embeds(ids, truth.features)
            logits = self.reference.logits(embeds, self.reference.position_ids(ids))
        regret = metrics.regret(tokens, logits[len(truth.prompt_ids) - 1 :])
        detail = self._first_difference(tokens) if wrong else None
        return {"wrong": wrong, "regret": regret}, detail

    def _first_difference(self, tokens: Int[np.ndarray, " N"]) -> str:
        """Where the tokens part, with the margins of both sides at that place."""
        made, P = self.truth.made, len(self.truth.prompt_ids)
        shorter = min(len(tokens), len(made.tokens))
        at = next((i for i in range(shorter) if tokens[i] != made.tokens[i]), shorter)
        if at == shorter:
            return f"{len(tokens)} tokens, the reference {len(made.tokens)}, equal up to there"
        logits, _ = self._decode(0, P + at, keep=1)
        return (
            f"token {at}: {tokens[at]} (bundle's margin {metrics.margin(logits[-1]):.3g}), "
            f"reference {made.tokens[at]} (margin {metrics.margin(made.logits[at]):.3g})"
        )

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


def max_new_tokens(manifest: Manifest) -> int:
    """The bundle's own default, within reason."""
    return min(MAX_NEW_TOKENS, manifest.generation.max_new_tokens)


def _wrong_tokens(ours: Int[np.ndarray, " N"], truth: Int[np.ndarray, " M"]) -> int:
    """Places at which the tokens differ; those that one side lacks count."""
    shorter = min(len(ours), len(truth))
    return int(np.sum(ours[:shorter] != truth[:shorter])) + abs(len(ours) - len(truth))


def run_ladder(
    reference: Reference,
    models: Mapping[str, VLM],
    pictures: Sequence[Picture],
    progress: Callable[[Row], None] | None = None,
) -> tuple[Row, ...]:
    """All rungs for every picture and every precision's model."""
    manifest = next(iter(models.values())).components.manifest
    image_token_id = manifest.prompt.image_token_id
    rows = []
    for number, picture in enumerate(pictures):
        truth = Truth.of(reference, picture, max_new_tokens(manifest), image_token_id)
        for precision, model in models.items():
            ladder = Ladder(model, reference, picture, truth, (number, len(pictures)))
            for row in ladder.climb(precision):
                rows.append(row)
                if progress is not None:
                    progress(row)
    return tuple(rows)
