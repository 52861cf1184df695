"""Turn the bundle's errors into findings, and judge the tokens that it generated."""

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
from vlmport.parity.report import GRAPH_FAILS, Measure, Row
from vlmport.parity.rungs import Found
from vlmport.parity.truth import Truth
from vlmport.runtime.graphs.sessions import ORT_ERRORS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MAX_NEW_TOKENS = 32
Progress = Callable[[int, int, str], None]  # rungs done, all rungs, what is next


class BrokenError(Exception):
    """The bundle raised an error; the text of this one is the finding.

    Attributes:
        code: the code of the bundle's error, or GRAPH_FAILS for one of ONNX Runtime.
    """

    def __init__(self, error: Exception):
        super().__init__(f"{type(error).__name__}: {error}")
        self.code = error.code if isinstance(error, VlmportError) else GRAPH_FAILS


@contextlib.contextmanager
def bundle_runs() -> Iterator[None]:
    """Wrap every call into the bundle: its errors are findings, the reference's are not."""
    try:
        yield
    except (VlmportError, *ORT_ERRORS) as error:
        raise BrokenError(error) from error


def row_of(
    name: str, precision: str, rung: str, limits: Mapping[str, Limit], find: Callable[[], Found]
) -> Row:
    """Compare on one rung: make a row of the measures with limits, or of the bundle's error."""
    try:
        values, detail = find()
    except BrokenError as error:
        return Row(name, precision, rung, (), error=str(error), code=error.code)
    measures = tuple(Measure(one, values[one], limit) for one, limit in limits.items())
    return Row(name, precision, rung, measures, detail=detail)


def max_new_tokens(manifest: Manifest) -> int:
    """Return the bundle's own maximum of new tokens, but no more than MAX_NEW_TOKENS."""
    return min(MAX_NEW_TOKENS, manifest.generation.max_new_tokens)


@dataclass(frozen=True)
class Judge:
    """Compare the bundle's tokens with the reference's, and ask how likely that finds them.

    Attributes:
        logits: gives the bundle's logits from which it chose the n-th of the truth's tokens.
    """

    reference: Reference
    truth: Truth
    manifest: Manifest
    logits: Callable[[int], Float[np.ndarray, " V"]]

    def tokens(self, tokens: Sequence[int]) -> Found:
        """Count the tokens that differ, and their regret; the detail names the first difference."""
        ours = np.asarray(tokens, np.int64)
        if self.truth.is_cut:
            ours = ours[: len(self.truth.made.tokens)]
        wrong = _wrong_tokens(ours, self.truth.made.tokens)
        if not wrong:
            return {"wrong": 0, "regret": 0}, None
        detail = self._first_difference(ours)
        return {"wrong": wrong, "regret": self._regret(ours)}, detail

    def stops(self, tokens: Sequence[int]) -> Found:
        """Judge tokens, and compare the bundle's stop ids with the reference's."""
        values, detail = self.tokens(tokens)
        stops = frozenset(self.manifest.generation.stop_token_ids)
        expected = frozenset(self.reference.stop_token_ids)
        if stops != expected:
            ids = f"stop ids {sorted(stops)}, the reference {sorted(expected)}"
            detail = f"{ids}; {detail}" if detail else ids
        return values | {"stop ids": len(stops ^ expected)}, detail

    def _regret(self, tokens: Int[np.ndarray, " N"]) -> float:
        """Return by how many nats a token the reference finds its own choices more likely.

        An end before max_new_tokens without a stop token of the reference counts as one more
        choice, in full. Infinite where the text goes on after a stop token: `generate` never does.
        """
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
        """Describe the first difference, with the margins of both sides at that token."""
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
    """Count the places at which tokens differ; tokens that one side lacks count too."""
    shorter = min(len(ours), len(truth))
    return int(np.sum(ours[:shorter] != truth[:shorter])) + abs(len(ours) - len(truth))
