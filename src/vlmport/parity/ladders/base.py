"""What the ladders of all layouts share: how rungs are climbed, and the figures of those that
several ladders have.

A ladder is one request on a bundle of one layout at one precision, beside what the reference makes
of it. The module of each layout holds what differs: which rungs there are, and how the bundle's
side comes to its results.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from vlmport.bundle import Manifest
from vlmport.parity import metrics
from vlmport.parity.asked import Request
from vlmport.parity.judging import (
    BrokenError,
    Found,
    Judge,
    Progress,
    bundle_runs,
    max_new_tokens,
    row_of,
)
from vlmport.parity.limits import Limit
from vlmport.parity.protocol import Reference
from vlmport.parity.reference_errors import RefusedError
from vlmport.parity.report import Row
from vlmport.parity.truth import PictureTruth, Truth
from vlmport.runtime.graphs.image_processor import ProcessedImage
from vlmport.runtime.messages import check_messages
from vlmport.runtime.prompt import Prompter

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Share = tuple[int, int]
Tensors = Mapping[str, np.ndarray]


class Runtime(Protocol):
    """What runs a bundle at one precision, and holds its sessions until it is closed."""

    def close(self) -> None: ...


Ours = TypeVar("Ours", bound=Runtime)
Theirs = TypeVar("Theirs", bound=Reference)


@dataclass(frozen=True)
class Climber(ABC, Generic[Ours, Theirs]):
    """The bundle's side at one precision, and the reference's, for one request.

    The rung `pixels` is the method `_pixels`, and so on.

    Attributes:
        rungs: in their order, from the bottom.
        request: as it is asked of the bundle.
        truth: what the reference makes of it.
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this request, so that n
            requests cover the whole table.
    """

    rungs: ClassVar[tuple[str, ...]]

    runtime: Ours
    reference: Theirs
    request: Request
    truth: Truth
    share: Share

    @property
    @abstractmethod
    def manifest(self) -> Manifest:
        """The bundle's."""

    @abstractmethod
    def limits(self, precision: str) -> Mapping[str, Mapping[str, Limit]]:
        """Rung → measure → limit."""

    @abstractmethod
    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        """The bundle's own where it chooses the token after the prompt and `at` of the truth's."""

    def climb(self, precision: str) -> Iterator[Row]:
        """Every rung in order, whether or not one before it broke."""
        limits = self.limits(precision)
        for rung in self.rungs:
            find = getattr(self, f"_{rung}")
            yield row_of(self.request.name, precision, rung, limits[rung], find)

    @property
    def judge(self) -> Judge:
        """Of tokens that the bundle made."""
        return Judge(self.reference, self.truth, self.manifest, self.next_logits)

    @property
    def max_new_tokens(self) -> int:
        return max_new_tokens(self.manifest)

    @property
    def words(self) -> Int[np.ndarray, " n"]:
        """This request's share of the vocabulary."""
        k, n = self.share
        return np.arange(k, self.reference.dims["vocab_size"], n)

    @property
    def tail(self) -> int:
        """Rows of the truth's logits from which a token is predicted: the prompt's last, and one
        for each token after it."""
        return len(self.truth.ids) - len(self.truth.prompt_ids) + 1

    def processed(
        self, process: Callable[[np.ndarray, Mapping[str, Any]], ProcessedImage]
    ) -> Iterator[tuple[ProcessedImage, PictureTruth]]:
        """The bundle's side of each picture, and the reference's."""
        for picture, truth in zip(self.request.pictures, self.truth.pictures, strict=True):
            with bundle_runs():
                processed = process(picture.rgb, self.request.options)
            yield processed, truth

    def pixel_figures(self, pairs: Iterable[tuple[Tensors, Tensors]]) -> Found:
        """Of the vision encoder's inputs by name, ours and the truth of each picture.

        Grey levels tell a weight that was rounded to its neighbour from another filter.
        """
        wrong, errors = 0, [0.0]
        for ours, truth in pairs:
            if absent := sorted(truth.keys() - ours.keys()):
                detail = f"the image processor has no {', '.join(absent)}"
                return {"wrong": float("inf"), "levels": float("inf")}, detail
            wrong += sum(metrics.unequal(ours[name], truth[name]) for name in truth)
            errors += [metrics.max_error(ours[name], truth[name]) for name in truth]
        largest = metrics.largest(errors)
        levels = largest / self.reference.grey_level
        detail = f"largest difference {largest:.3g}, {levels:.3g} grey levels" if wrong else None
        return {"wrong": wrong, "levels": levels}, detail

    def merged_figures(
        self, merge: Callable[[Int[np.ndarray, " S"]], Float[np.ndarray, "S D"]]
    ) -> Found:
        """Of embeddings with the truth's features among them, which `merge` makes of ids.

        Text before and after the pictures: a share of the vocabulary, half on each side.
        """
        token = self.manifest.prompt.image_token_id
        words = self.words[self.words != token]
        pictures = [picture.ids for picture in self.truth.pictures]
        ids = np.concatenate([words[::2], *pictures, words[1::2]])
        expected = self.reference.embeds(ids, self.truth.features)
        with bundle_runs():
            ours = merge(ids)
        text = ids != token
        return {
            **embedding_figures(ours[text], expected[text]),
            "wrong": metrics.unequal(ours, expected),
            "wrong features": metrics.unequal(ours[~text], expected[~text]),
        }, None

    def prompt_found(
        self, found: Found, ids: Int[np.ndarray, " S"], tokens: int | None = None
    ) -> Found:
        """What was found of the tokens, and how many ids of the prompt differ.

        Args:
            tokens: how many the prompt had that was answered; None for as many as ids.
        """
        (values, detail), truth = found, self.truth.prompt_ids
        tokens = len(ids) if tokens is None else tokens
        if wrong := max(metrics.unequal(ids, truth), abs(tokens - len(truth))):
            told = f"a prompt of {tokens} tokens, expected {len(truth)}; {wrong} ids differ"
            detail = f"{told}; {detail}" if detail else told
        return values | {"prompt": wrong}, detail


@dataclass(frozen=True)
class Refused:
    """A request that the reference refuses, in the place of its ladder.

    Attributes:
        name: the request's.
        reason: why the reference refuses it.
        rung: of the row: the one that runs the bundle alone.
        alone: runs the bundle alone, from pictures and messages to tokens.
    """

    name: str
    reason: str
    rung: str
    alone: Callable[[], object]

    def climb(self, precision: str) -> Iterator[Row]:
        """One row: passed where the bundle refuses the request too."""
        try:
            with bundle_runs():
                self.alone()
        except BrokenError as error:
            detail = f"both refuse it; transformers: {self.reason}; the bundle: {error}"
            yield Row(self.name, precision, self.rung, (), detail=detail)
            return
        told = f"transformers refuses it ({self.reason}), the bundle answers"
        yield Row(self.name, precision, self.rung, (), error=told)


def refused(
    request: Request, reason: str, rung: str, alone: Callable[[Ours, Request], object]
) -> Callable[[Ours], Refused]:
    """Prepare a Refused of the bundle's side."""
    return lambda runtime: Refused(request.name, reason, rung, lambda: alone(runtime, request))


def prompt_of(
    request: Request,
    manifest: Manifest,
    prompter: Prompter,
    pictures: Sequence[Int[np.ndarray, " T"]],
) -> Int[np.ndarray, " S"]:
    """The ids of a request's prompt as the bundle's template and tokenizer make them.

    Args:
        pictures: the ids of each picture. Raises as the runtime does.
    """
    asked = manifest.prompt.caption if request.is_caption else request.messages
    chat = check_messages(asked, [picture.rgb for picture in request.pictures])
    return prompter.splice(prompter.ids(chat.messages), list(pictures))


def prompt_id_figures(pairs: Iterable[tuple[ProcessedImage, PictureTruth]]) -> Found:
    """Of the ids of each picture. Those of the text around them are the last rung's."""
    wrong, details = 0, []
    for processed, truth in pairs:
        if unequal := metrics.unequal(processed.prompt_ids, truth.ids):
            wrong += unequal
            details.append(f"{len(processed.prompt_ids)} ids, expected {len(truth.ids)}")
    return {"wrong": wrong}, "; ".join(details) or None


def feature_figures(
    pairs: Iterable[tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]],
) -> Found:
    """Of features, ours and the truth: the worst of all pairs by each measure."""
    found = [closeness(ours, truth)[0] for ours, truth in pairs]
    if not found:
        return {"worst": 0.0, "typical": 0.0, "cosine": 1.0}, "no picture"
    return worst_of(found), None


def worst_of(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By each measure the worst of several: the least cosine, the largest of all else."""
    return {
        name: (metrics.least if name == "cosine" else metrics.largest)(one[name] for one in found)
        for name in found[0]
    }


def embedding_figures(
    ours: Float[np.ndarray, "S D"], truth: Float[np.ndarray, "S D"]
) -> dict[str, float]:
    """Of rows of the embedding, by every measure that some precision has a limit on."""
    return {
        "wrong": metrics.unequal(ours, truth),
        "cosine": metrics.least_cosine(ours, truth),
        "8 bits": metrics.rounding_steps(ours, truth, 8),
        "7 bits": metrics.rounding_steps(ours, truth, 7, truth.shape[1]),
        "4 bits": metrics.rounding_steps(ours, truth, 4),
    }


def closeness(
    ours: Float[np.ndarray, "S V"], truth: Float[np.ndarray, "S V"], tail: int = 0
) -> Found:
    """How far rows are apart by every measure; of the last `tail` rows as logits too."""
    values: dict[str, float] = {
        "worst": metrics.worst_error(ours, truth),
        "typical": metrics.typical_error(ours, truth),
        "cosine": metrics.least_cosine(ours, truth),
    }
    if tail:
        values["kl"] = metrics.mean_divergence(ours[-tail:], truth[-tail:])
        values["top1"] = metrics.agreement(ours[-tail:], truth[-tail:])
    return values, None


def truth_of(reference: Reference, manifest: Manifest, request: Request) -> Truth:
    """What the reference makes of a request, with as many new tokens as the bundle makes."""
    return Truth.of(reference, request, max_new_tokens(manifest), manifest.prompt.image_token_id)


def climb_all(
    rungs: Sequence[str],
    precisions: Sequence[str],
    requests: Sequence[Request],
    prepare: Callable[[Request, Share], Callable[[Ours], Climber[Ours, Any]]],
    open_at: Callable[[str], Ours],
    alone: Callable[[Ours, Request], object],
    progress: Progress | None,
) -> tuple[Row, ...]:
    """All rungs for every precision and every request.

    One precision at a time, so that beside the reference only its sessions are in memory.

    Args:
        prepare: asks the reference about one request, once, and gives what makes a ladder of it
            and the bundle's side. Raises RefusedError where the reference refuses it.
        open_at: the bundle's side at a precision.
        alone: runs the bundle alone, from pictures and messages to tokens.
        progress: is told of each rung: how many are done, of how many, and what is next.
    """
    tell = progress or (lambda done, total, what: None)
    total = len(rungs) * len(requests) * len(precisions)
    prepared: list[Callable[[Ours], Climber[Ours, Any] | Refused]] = []
    for number, request in enumerate(requests):
        tell(0, total, f"reference, {request.name}")
        try:
            prepared.append(prepare(request, (number, len(requests))))
        except RefusedError as refusal:
            prepared.append(refused(request, str(refusal), rungs[-1], alone))
    rows: list[Row] = []
    for precision in precisions:
        with closing(open_at(precision)) as runtime:
            for request, ladder_on in zip(requests, prepared, strict=True):
                tell(len(rows), total, f"{precision}, {request.name}")
                for row in ladder_on(runtime).climb(precision):
                    rows.append(row)
                    tell(len(rows), total, f"{precision}, {request.name}")
    return tuple(rows)
