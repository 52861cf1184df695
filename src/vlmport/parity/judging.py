"""What all ladders share: findings, and the judgement of generated tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Manifest
from vlmport.errors import VlmportError
from vlmport.parity import metrics
from vlmport.parity.limits import Limit
from vlmport.parity.protocol import Reference
from vlmport.parity.report import Measure, Row
from vlmport.parity.truth import Truth
from vlmport.runtime.graphs.sessions import ORT_ERRORS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MAX_NEW_TOKENS = 32
Progress = Callable[[int, int, str], None]  # rungs done, all rungs, what is next
Found = tuple[dict[str, float], str | None]  # measures, and a detail for the reader


class BrokenError(Exception):
    """The bundle raised an error; the text of this one is the finding."""


@contextlib.contextmanager
def bundle_runs() -> Iterator[None]:
    """Round each call of the bundle's side: an error there is a finding, the reference's is not."""
    try:
        yield
    except (VlmportError, *ORT_ERRORS) as error:
        raise BrokenError(f"{type(error).__name__}: {error}") from error


def row_of(
    name: str, precision: str, rung: str, limits: Mapping[str, Limit], find: Callable[[], Found]
) -> Row:
    """One rung: what was found beside its limits, or the error that the bundle raised."""
    try:
        values, detail = find()
    except BrokenError as error:
        return Row(name, precision, rung, (), error=str(error))
    measures = tuple(Measure(one, values[one], limit) for one, limit in limits.items())
    return Row(name, precision, rung, measures, detail=detail)


def max_new_tokens(manifest: Manifest) -> int:
    """The bundle's own default, within reason."""
    return min(MAX_NEW_TOKENS, manifest.generation.max_new_tokens)


@dataclass(frozen=True)
class Judge:
    """Tokens against the reference's, and what the reference thinks of them.

    Attributes:
        logits: the bundle's own where it chose the n-th of the truth's tokens.
    """

    reference: Reference
    truth: Truth
    manifest: Manifest
    logits: Callable[[int], Float[np.ndarray, " V"]]

    def tokens(self, tokens: Sequence[int]) -> Found:
        """How many differ, and the regret of it; a detail says where they part."""
        ours = np.asarray(tokens, np.int64)
        if self.truth.is_cut:
            ours = ours[: len(self.truth.made.tokens)]
        wrong = _wrong_tokens(ours, self.truth.made.tokens)
        if not wrong:
            return {"wrong": 0, "regret": 0}, None
        detail = self._first_difference(ours)
        return {"wrong": wrong, "regret": self._regret(ours)}, detail

    def stops(self, tokens: Sequence[int]) -> Found:
        """The same, and the bundle's stop ids against the reference's."""
        values, detail = self.tokens(tokens)
        stops = frozenset(self.manifest.generation.stop_token_ids)
        expected = frozenset(self.reference.stop_token_ids)
        if stops != expected:
            ids = f"stop ids {sorted(stops)}, the reference {sorted(expected)}"
            detail = f"{ids}; {detail}" if detail else ids
        return values | {"stop ids": len(stops ^ expected)}, detail

    def _regret(self, tokens: Int[np.ndarray, " N"]) -> float:
        """Nats a token by which the reference likes its own choices better, and an end before
        max_new_tokens without a stop token of its own as one more choice, in full. Infinite where
        the text goes on after such a token: `generate` never does."""
        stops, image = self.reference.stop_token_ids, self.manifest.prompt.image_token_id
        ended = tokens[-1] not in stops and len(tokens) < max_new_tokens(self.manifest)
        if np.isin(tokens[:-1], stops).any():
            return float("inf")
        if image in tokens:  # it can't be fed back
            tokens, ended = tokens[: tokens.tolist().index(image) + 1], False
        ids = np.concatenate([self.truth.prompt_ids, tokens if ended else tokens[:-1]])
        embeds = self.reference.embeds(ids, self.truth.features)
        positions = self.reference.position_ids(ids, self.truth.pixels)
        logits = self.reference.logits(embeds, positions)
        logits = logits[len(self.truth.prompt_ids) - 1 :]
        regret = metrics.regret(tokens, logits[: len(tokens)])
        return regret + metrics.end_regret(logits[-1], stops) if ended else regret

    def _first_difference(self, tokens: Int[np.ndarray, " N"]) -> str:
        """Where the tokens part, with the margins of both sides at that place."""
        made = self.truth.made
        shorter = min(len(tokens), len(made.tokens))
        at = next((i for i in range(shorter) if tokens[i] != made.tokens[i]), shorter)
        if at == shorter:
            return f"{len(tokens)} tokens, the reference {len(made.tokens)}, equal up to there"
        with bundle_runs():
            margin = metrics.margin(self.logits(at))
        return (
            f"token {at}: {tokens[at]} (bundle's margin {margin:.3g}), "
            f"reference {made.tokens[at]} (margin {metrics.margin(made.logits[at]):.3g})"
        )


def _wrong_tokens(ours: Int[np.ndarray, " N"], truth: Int[np.ndarray, " M"]) -> int:
    """Places at which the tokens differ; those that one side lacks count."""
    shorter = min(len(ours), len(truth))
    return int(np.sum(ours[:shorter] != truth[:shorter])) + abs(len(ours) - len(truth))
