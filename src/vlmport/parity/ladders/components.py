"""Climb from the image to the tokens through the four files of the layout `components`.

Each rung gives the bundle what the *reference* made on the rung before, and only the last one runs
the bundle alone. The text's embedding has no file of its own: it is cut out of the two graphs that
read ids.

P prefix rows, S prefix rows and new tokens, N patches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.layouts import COMPONENTS
from vlmport.errors import SourceError
from vlmport.parity import limits, metrics
from vlmport.parity.asked import Request
from vlmport.parity.embedding_of import look_up
from vlmport.parity.judging import bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Answer,
    Ladder,
    Share,
    closeness,
    embedding_figures,
    truth_of,
    worst_of,
)
from vlmport.parity.protocol import HiddenStates, PrefixReference, Reference
from vlmport.parity.rungs import Found, Rung
from vlmport.runtime.layouts.components import BEGIN, GO_ON, FourFiles

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class FourFilesLadder(Ladder[FourFiles, PrefixReference]):
    """Compare the four files with the reference.

    Attributes:
        hidden: the hidden states of the image in the reference's tower.
    """

    layout = COMPONENTS

    hidden: HiddenStates

    @classmethod
    def open(cls, bundle: Bundle, precision: str) -> FourFiles:
        return FourFiles.open(bundle, precision=precision)

    @classmethod
    def prepare(
        cls, reference: Reference, bundle: Bundle, precisions: Sequence[str]
    ) -> Callable[[Request, Share], Callable[[FourFiles], FourFilesLadder]]:
        if not isinstance(reference, PrefixReference):
            raise SourceError(
                f"{bundle.folder}: the layout {COMPONENTS!r} is for models that read an image as a "
                "prefix, and the reference is not such a model",
                hint="give the checkpoint that the bundle was exported from",
                code="verify.other-checkpoint",
            )

        def ask(request: Request, share: Share) -> Callable[[FourFiles], FourFilesLadder]:
            truth = truth_of(reference, bundle.manifest, request)
            hidden = reference.hidden_states(truth.pictures[0].pixels)
            return partial(
                cls, reference=reference, request=request, truth=truth, share=share, hidden=hidden
            )

        return ask

    @staticmethod
    def alone(runtime: FourFiles, request: Request) -> Answer:
        pixels = runtime.pixels(request.pictures[0].rgb)
        return Answer(greedy(runtime, runtime.project(runtime.encode(pixels).hidden)))

    @property
    def manifest(self) -> Manifest:
        return self.runtime.manifest

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        return self.runtime.begin(self.truth.features, self.truth.made.tokens[:at])[0][-1]

    def pixels(self) -> Found:
        """Compare the vision encoder's input."""
        with bundle_runs():
            ours = self.runtime.pixels(self.request.pictures[0].rgb)
        return self.pixel_figures([({"pixel_values": ours}, self.truth.pictures[0].pixels)])

    def hidden_states(self) -> Found:
        """Compare the last hidden states of the vision encoder."""
        with bundle_runs():
            ours = self.runtime.encode(self._truths_pixels).hidden
        return closeness(ours, self.hidden.last)

    def pooler_output(self) -> Found:
        """Compare the pooled vector; a bundle has one only where the model has a pooling head."""
        with bundle_runs():
            ours = self.runtime.encode(self._truths_pixels).pooled
        truth = self.hidden.pooled
        if truth is None:
            none = np.ones((1, 1), np.float32)
            values, _ = closeness(none if ours is None else ours[None], none)
            return values, "the checkpoint has no pooling head"
        if ours is None:
            values, _ = closeness(np.zeros((0, 0), np.float32), truth[None])
            return values, "the vision encoder has no pooler_output"
        return closeness(ours[None], truth[None])

    def projected_prefix(self) -> Found:
        """Compare the projection of the reference's hidden states."""
        with bundle_runs():
            ours = self.runtime.project(self.hidden.last)
        return closeness(ours, self.truth.features)

    def embeddings(self) -> Found:
        """Compare a share of the embedding, as both graphs that read ids have it."""
        expected = self.reference.embeds(self.words, self.truth.features[:0])
        found = []
        for component in (BEGIN, GO_ON):
            with bundle_runs():
                ours = look_up(self.runtime.path(component), self.words)
            found.append(embedding_figures(ours, expected))
        return worst_of(found), None

    def first_logits(self) -> Found:
        """Compare the logits of the prefix alone, without any prompt ids."""
        truth = self.truth.logits[: len(self.truth.prompt_ids)]
        with bundle_runs():
            ours, _ = self.runtime.begin(self.truth.features, NO_IDS)
        return closeness(ours, truth, tail=1)

    def prompted_logits(self) -> Found:
        """Compare the logits of the prefix with the reference's tokens as prompt ids."""
        with bundle_runs():
            ours, _ = self.runtime.begin(self.truth.features, self._new_ids)
        return closeness(ours, self.truth.logits, tail=self.tail)

    def cached_decode(self) -> Found:
        """Feed the prefix, two tokens at once, then token by token; compare with one pass of each
        side."""
        truth, ids, tail = self.truth.logits, self._new_ids, self.tail
        with bundle_runs():
            logits, cache = self.runtime.begin(self.truth.features, NO_IDS)
            parts, at = [logits], 0
            while at < len(ids):
                stop = at + (2 if at == 0 else 1)
                logits, cache = self.runtime.go_on(ids[at:stop], cache)
                parts.append(logits)
                at = stop
            whole, _ = self.runtime.begin(self.truth.features, ids)
        ours = np.concatenate(parts)
        values, _ = closeness(ours, truth, tail=tail)
        return values | {
            "self": metrics.worst_error(ours, whole),
            "self kl": metrics.mean_divergence(ours[-tail:], whole[-tail:]),
        }, None

    def greedy_tokens(self) -> Found:
        """Judge the tokens of a plain loop over the two graphs, from the reference's prefix."""
        with bundle_runs():
            tokens = greedy(self.runtime, self.truth.features)
        return self.judge.stops(tokens)

    @property
    def _truths_pixels(self) -> Float[np.ndarray, "1 3 h w"]:
        return self.truth.pictures[0].pixels["pixel_values"]

    @property
    def _new_ids(self) -> Int[np.ndarray, " n"]:
        """The reference's tokens but the last, which is never fed back."""
        return self.truth.ids[len(self.truth.prompt_ids) :]

    rungs = (
        Rung("pixels", pixels, limits.PIXELS),
        Rung("hidden_states", hidden_states, limits.FEATURES),
        Rung("pooler_output", pooler_output, limits.POOLER_OUTPUT),
        Rung("projected_prefix", projected_prefix, limits.FEATURES),
        Rung("embeddings", embeddings, limits.EMBEDDINGS),
        Rung("first_logits", first_logits, limits.LAST_LOGITS),
        Rung("prompted_logits", prompted_logits, limits.LOGITS),
        Rung("cached_decode", cached_decode, limits.GROWING_CACHE),
        Rung("greedy_tokens", greedy_tokens, limits.GREEDY_TOKENS),
        Rung("end_to_end", Ladder.end_to_end, limits.END_WITHOUT_PROMPT),
    )


def greedy(graphs: FourFiles, prefix: Float[np.ndarray, "P D"]) -> list[int]:
    """Generate the tokens after a prefix, up to the bundle's maximum."""
    manifest = graphs.manifest
    stops = manifest.generation.stop_token_ids
    return graphs.greedy(prefix, NO_IDS, max_new_tokens(manifest), stops)[0]
