"""The ladder of the layout `components`: from the picture through its four files to the tokens.

As in ladder.py, each rung gives the bundle what the *reference* made on the rung before, and only
the last one runs the bundle alone. The text's embedding has no file of its own: it is cut out of
the graphs that begin and go on.

P prefix rows, S prefix rows and new tokens, N patches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Bundle
from vlmport.errors import SourceError
from vlmport.runtime.four_files import BEGIN, GO_ON, FourFiles
from vlmport.verify import metrics
from vlmport.verify.climbing import closeness
from vlmport.verify.judging import Found, Judge, Progress, bundle_runs, max_new_tokens, row_of
from vlmport.verify.limits import FOUR_FILES_RUNGS, four_files_limits_of
from vlmport.verify.lookup import look_up
from vlmport.verify.protocol import HiddenStates, PrefixReference, Reference
from vlmport.verify.report import Row
from vlmport.verify.requests import Request
from vlmport.verify.truth import Truth

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class FourFilesLadder:
    """The bundle's side at one precision, and the reference.

    Attributes:
        hidden: what the reference's tower makes of the picture.
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this request, so that n
            requests cover the whole table.
    """

    files: FourFiles
    reference: PrefixReference
    request: Request
    truth: Truth
    hidden: HiddenStates
    share: tuple[int, int]

    def climb(self, precision: str) -> Iterator[Row]:
        """Every rung in order, whether or not one before it broke."""
        limits = four_files_limits_of(precision, self.files.manifest.pixels.resample)
        for rung in FOUR_FILES_RUNGS:
            find = getattr(self, f"_{rung}")
            yield row_of(self.request.name, precision, rung, limits[rung], find)

    def _pixels(self) -> Found:
        truth = self.truth.pictures[0].pixels["pixel_values"]
        with bundle_runs():
            ours = self.files.pixels(self.request.pictures[0].rgb)
        wrong = metrics.unequal(ours, truth)
        levels = metrics.max_error(ours, truth) / self.reference.grey_level
        return {"wrong": wrong, "levels": levels}, f"{levels:.3g} grey levels" if wrong else None

    def _hidden_states(self) -> Found:
        with bundle_runs():
            ours = self.files.encode(self._truths_pixels).hidden
        return closeness(ours, self.hidden.last)

    def _pooler_output(self) -> Found:
        """Present where the reference has one, and only there."""
        with bundle_runs():
            ours = self.files.encode(self._truths_pixels).pooled
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
            ours = self.files.project(self.hidden.last)
        return closeness(ours, self.truth.features)

    def _embeddings(self) -> Found:
        """A share of the vocabulary, as both graphs look it up."""
        k, n = self.share
        words = np.arange(k, self.reference.dims["vocab_size"], n)
        expected = self.reference.embeds(words, self.truth.features[:0])
        found = []
        for component in (BEGIN, GO_ON):
            path = self.files.bundle.path(
                self.files.bundle.variant(component, self.files.choice[component]).model
            )
            with bundle_runs():
                found.append(look_up(path, words))
        width = expected.shape[1]
        return {
            "wrong": max(metrics.unequal(ours, expected) for ours in found),
            "cosine": min(metrics.least_cosine(ours, expected) for ours in found),
            "7 bits": max(metrics.rounding_steps(ours, expected, 7, width) for ours in found),
            "4 bits": max(metrics.rounding_steps(ours, expected, 4) for ours in found),
        }, None

    def _first_logits(self) -> Found:
        """The prefix alone: no prompt ids at all."""
        truth = self.truth.logits[: self._prefix_rows]
        with bundle_runs():
            ours, _ = self.files.begin(self.truth.features, NO_IDS)
        return closeness(ours, truth, tail=1)

    def _prompted_logits(self) -> Found:
        """The prefix and, as prompt ids, the reference's tokens."""
        with bundle_runs():
            ours, _ = self.files.begin(self.truth.features, self._new_ids)
        return closeness(ours, self.truth.logits, tail=len(self._new_ids) + 1)

    def _cached_decode(self) -> Found:
        """The prefix, two tokens at once, then token by token, against one pass of each side."""
        truth, ids, tail = self.truth.logits, self._new_ids, len(self._new_ids) + 1
        with bundle_runs():
            logits, cache = self.files.begin(self.truth.features, NO_IDS)
            parts, at = [logits], 0
            while at < len(ids):
                stop = at + (2 if at == 0 else 1)
                logits, cache = self.files.go_on(ids[at:stop], cache)
                parts.append(logits)
                at = stop
            whole, _ = self.files.begin(self.truth.features, ids)
        ours = np.concatenate(parts)
        values, _ = closeness(ours, truth, tail=tail)
        return values | {
            "self": metrics.worst_error(ours, whole),
            "self kl": metrics.mean_divergence(ours[-tail:], whole[-tail:]),
        }, None

    def _greedy_tokens(self) -> Found:
        """A plain loop over the two graphs, from the reference's prefix."""
        return self._judge.stops(self._greedy(self.truth.features))

    def _end_to_end(self) -> Found:
        """From the picture to the tokens by the bundle alone."""
        with bundle_runs():
            pixels = self.files.pixels(self.request.pictures[0].rgb)
            prefix = self.files.project(self.files.encode(pixels).hidden)
        return self._judge.tokens(self._greedy(prefix))

    def _greedy(self, prefix: Float[np.ndarray, "P D"]) -> list[int]:
        manifest = self.files.manifest
        stops, most = manifest.generation.stop_token_ids, max_new_tokens(manifest)
        with bundle_runs():
            return self.files.greedy(prefix, NO_IDS, most, stops)[0]

    @property
    def _judge(self) -> Judge:
        def logits(at: int) -> Float[np.ndarray, " V"]:
            return self.files.begin(self.truth.features, self.truth.made.tokens[:at])[0][-1]

        return Judge(self.reference, self.truth, self.files.manifest, logits)

    @property
    def _truths_pixels(self) -> Float[np.ndarray, "1 3 h w"]:
        return self.truth.pictures[0].pixels["pixel_values"]

    @property
    def _prefix_rows(self) -> int:
        return len(self.truth.prompt_ids)

    @property
    def _new_ids(self) -> Int[np.ndarray, " n"]:
        """The reference's tokens but the last, which is never fed back."""
        return self.truth.ids[self._prefix_rows :]


def run_four_files_ladder(
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
    if not isinstance(reference, PrefixReference):
        raise SourceError(
            f"{bundle.folder}: its layout is that of a picture as prefix, the reference is another "
            "model's",
            hint="give the checkpoint that `vlmport export` was given",
        )
    tell = progress or (lambda done, total, what: None)
    total = len(FOUR_FILES_RUNGS) * len(requests) * len(precisions)
    manifest, truths = bundle.manifest, []
    for request in requests:
        tell(0, total, f"reference, {request.name}")
        most, image_token_id = max_new_tokens(manifest), manifest.prompt.image_token_id
        truth = Truth.of(reference, request, most, image_token_id)
        truths.append((truth, reference.hidden_states(truth.pictures[0].pixels)))
    rows: list[Row] = []
    for precision in precisions:
        files = FourFiles.open(bundle, precision=precision)
        for number, (request, (truth, hidden)) in enumerate(zip(requests, truths, strict=True)):
            tell(len(rows), total, f"{precision}, {request.name}")
            share = (number, len(requests))
            for row in FourFilesLadder(files, reference, request, truth, hidden, share).climb(
                precision
            ):
                rows.append(row)
                tell(len(rows), total, f"{precision}, {request.name}")
        files.close()
    return tuple(rows)
