"""The ladder of the layout `components`: from the picture through its four files to the tokens.

As in ladder.py, each rung gives the bundle what the *reference* made on the rung before, and only
the last one runs the bundle alone. The text's embedding has no file of its own: it is cut out of
the graphs that begin and go on.

P prefix rows, S prefix rows and new tokens, N patches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.errors import SourceError
from vlmport.parity import metrics
from vlmport.parity.asked import Request
from vlmport.parity.embedding_of import look_up
from vlmport.parity.judging import Found, Progress, bundle_runs, max_new_tokens
from vlmport.parity.ladders.base import (
    Climber,
    Share,
    climb_all,
    closeness,
    embedding_figures,
    truth_of,
    worst_of,
)
from vlmport.parity.limits import FOUR_FILES_RUNGS, Limit, four_files_limits_of
from vlmport.parity.protocol import HiddenStates, PrefixReference, Reference
from vlmport.parity.report import Row
from vlmport.runtime.layouts.components import BEGIN, GO_ON, FourFiles

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class FourFilesLadder(Climber[FourFiles, PrefixReference]):
    """The ladder of the four files.

    Attributes:
        hidden: what the reference's tower makes of the picture.
    """

    rungs = FOUR_FILES_RUNGS

    hidden: HiddenStates

    @property
    def manifest(self) -> Manifest:
        return self.runtime.manifest

    def limits(self, precision: str) -> Mapping[str, Mapping[str, Limit]]:
        return four_files_limits_of(precision, self.manifest.pixels.resample)

    def _pixels(self) -> Found:
        with bundle_runs():
            ours = self.runtime.pixels(self.request.pictures[0].rgb)
        return self.pixel_figures([({"pixel_values": ours}, self.truth.pictures[0].pixels)])

    def _hidden_states(self) -> Found:
        with bundle_runs():
            ours = self.runtime.encode(self._truths_pixels).hidden
        return closeness(ours, self.hidden.last)

    def _pooler_output(self) -> Found:
        """Present where the reference has one, and only there."""
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

    def _projected_prefix(self) -> Found:
        with bundle_runs():
            ours = self.runtime.project(self.hidden.last)
        return closeness(ours, self.truth.features)

    def _embeddings(self) -> Found:
        """A share of the vocabulary, as both graphs look it up."""
        expected = self.reference.embeds(self.words, self.truth.features[:0])
        found = []
        for component in (BEGIN, GO_ON):
            with bundle_runs():
                ours = look_up(self.runtime.path(component), self.words)
            found.append(embedding_figures(ours, expected))
        return worst_of(found), None

    def _first_logits(self) -> Found:
        """The prefix alone: no prompt ids at all."""
        truth = self.truth.logits[: len(self.truth.prompt_ids)]
        with bundle_runs():
            ours, _ = self.runtime.begin(self.truth.features, NO_IDS)
        return closeness(ours, truth, tail=1)

    def _prompted_logits(self) -> Found:
        """The prefix and, as prompt ids, the reference's tokens."""
        with bundle_runs():
            ours, _ = self.runtime.begin(self.truth.features, self._new_ids)
        return closeness(ours, self.truth.logits, tail=self.tail)

    def _cached_decode(self) -> Found:
        """The prefix, two tokens at once, then token by token, against one pass of each side."""
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

    def _greedy_tokens(self) -> Found:
        """A plain loop over the two graphs, from the reference's prefix."""
        return self.judge.stops(self._greedy(self.truth.features))

    def _end_to_end(self) -> Found:
        """From the picture to the tokens by the bundle alone."""
        with bundle_runs():
            tokens = alone(self.runtime, self.request)
        return self.judge.tokens(tokens)

    def _greedy(self, prefix: Float[np.ndarray, "P D"]) -> list[int]:
        with bundle_runs():
            return greedy(self.runtime, prefix)

    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        return self.runtime.begin(self.truth.features, self.truth.made.tokens[:at])[0][-1]

    @property
    def _truths_pixels(self) -> Float[np.ndarray, "1 3 h w"]:
        return self.truth.pictures[0].pixels["pixel_values"]

    @property
    def _new_ids(self) -> Int[np.ndarray, " n"]:
        """The reference's tokens but the last, which is never fed back."""
        return self.truth.ids[len(self.truth.prompt_ids) :]


def alone(graphs: FourFiles, request: Request) -> list[int]:
    """From the picture to the tokens. Raises as the bundle does."""
    pixels = graphs.pixels(request.pictures[0].rgb)
    return greedy(graphs, graphs.project(graphs.encode(pixels).hidden))


def greedy(graphs: FourFiles, prefix: Float[np.ndarray, "P D"]) -> list[int]:
    """The tokens after a prefix, as many as the bundle makes at most."""
    manifest = graphs.manifest
    stops = manifest.generation.stop_token_ids
    return graphs.greedy(prefix, NO_IDS, max_new_tokens(manifest), stops)[0]


def run_four_files_ladder(
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
    if not isinstance(reference, PrefixReference):
        raise SourceError(
            f"{bundle.folder}: its layout is that of a picture as prefix, the reference is another "
            "model's",
            hint="give the checkpoint that `vlmport export` was given",
            code="verify.other-checkpoint",
        )

    def prepare(request: Request, share: Share) -> Callable[[FourFiles], FourFilesLadder]:
        truth = truth_of(reference, bundle.manifest, request)
        hidden = reference.hidden_states(truth.pictures[0].pixels)
        return lambda files: FourFilesLadder(files, reference, request, truth, share, hidden)

    def open_at(precision: str) -> FourFiles:
        return FourFiles.open(bundle, precision=precision)

    return climb_all(FourFilesLadder.rungs, precisions, requests, prepare, open_at, alone, progress)
