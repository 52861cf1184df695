"""Share what the ladders of all layouts have in common: how they are climbed, and their figures.

A ladder is one request, asked of a bundle in one layout at one precision and compared with what the
reference makes of it. The module of each layout has its rungs, and runs its graphs.

P prompt tokens, S prompt and new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from vlmport.bundle import Bundle, Manifest
from vlmport.parity import metrics
from vlmport.parity.asked import Request
from vlmport.parity.judging import (
    BrokenError,
    Judge,
    Progress,
    bundle_runs,
    max_new_tokens,
    row_of,
)
from vlmport.parity.protocol import Reference
from vlmport.parity.reference_errors import RefusedError
from vlmport.parity.report import ONLY_BUNDLE_ANSWERS, Row
from vlmport.parity.rungs import Found, Rung
from vlmport.parity.truth import PictureTruth, Truth
from vlmport.runtime.graphs.image_processor import ProcessedImage
from vlmport.runtime.messages import check_messages
from vlmport.runtime.prompt import Prompter

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Share = tuple[int, int]
Tensors = Mapping[str, np.ndarray]


class Runtime(Protocol):
    """Something that runs a bundle at one precision, and holds its sessions until it is closed."""

    def close(self) -> None: ...


Ours = TypeVar("Ours", bound=Runtime)
Theirs = TypeVar("Theirs", bound=Reference)


@dataclass(frozen=True)
class Answer:
    """The bundle's answer to a request, without any help from the reference.

    Attributes:
        tokens: the generated ones, a stop token included.
        prompt_ids: the ids of the prompt; None in a layout without a prompt.
        prompt_tokens: how many the runtime counted; None for as many as prompt_ids.
    """

    tokens: Sequence[int]
    prompt_ids: Int[np.ndarray, " P"] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Ladder(ABC, Generic[Ours, Theirs]):
    """Compare a bundle at one precision with the reference, for one request.

    Attributes:
        layout: the name of the layout whose bundles this ladder is for.
        rungs: from the bottom up. The last one runs the bundle alone.
        request: as it is asked of the bundle.
        truth: the reference's result for it.
        share: (k, n): embedding rows k, k+n, k+2n, … are compared with this request, so that n
            requests cover the whole table.
    """

    layout: ClassVar[str]
    rungs: ClassVar[tuple[Rung, ...]]

    runtime: Ours
    reference: Theirs
    request: Request
    truth: Truth
    share: Share

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the rungs, from the bottom up."""
        return tuple(rung.name for rung in cls.rungs)

    @classmethod
    @abstractmethod
    def open(cls, bundle: Bundle, precision: str) -> Ours:
        """Open the bundle's side at a precision."""

    @classmethod
    def prepare(
        cls, reference: Reference, bundle: Bundle, precisions: Sequence[str]
    ) -> Callable[[Request, Share], Callable[[Ours], Ladder[Ours, Theirs]]]:
        """Return a function that asks the reference about one request.

        It gives in turn a function from the bundle's side to the ladder, so that the reference is
        asked once for all precisions.

        Args:
            precisions: those that will be climbed.

        Raises SourceError for a reference of another kind of model.
        """

        def ask(request: Request, share: Share) -> Callable[[Ours], Ladder[Ours, Theirs]]:
            truth = truth_of(reference, bundle.manifest, request)
            theirs: Any = reference
            return partial(cls, reference=theirs, request=request, truth=truth, share=share)

        return ask

    @staticmethod
    @abstractmethod
    def alone(runtime: Any, request: Request) -> Answer:
        """Run the bundle alone, from images and messages to tokens. Raises as the bundle does."""

    @property
    @abstractmethod
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""

    @abstractmethod
    def next_logits(self, at: int) -> Float[np.ndarray, " V"]:
        """The bundle's logits of the token after the prompt and `at` of the reference's tokens."""

    def climb(self, precision: str) -> Iterator[Row]:
        """Compare on every rung in order, whether or not one before it broke."""
        resample = self.manifest.pixels.resample
        for rung in self.rungs:
            limits = rung.limits.at(precision, resample)
            yield row_of(self.request.name, precision, rung.name, limits, partial(rung.find, self))

    @property
    def judge(self) -> Judge:
        """The judge of tokens that the bundle generated."""
        return Judge(self.reference, self.truth, self.manifest, self.next_logits)

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of new tokens."""
        return max_new_tokens(self.manifest)

    @property
    def words(self) -> Int[np.ndarray, " n"]:
        """This request's share of the vocabulary."""
        k, n = self.share
        return np.arange(k, self.reference.dims["vocab_size"], n)

    @property
    def tail(self) -> int:
        """Number of the truth's rows of logits that predict a new token: the prompt's last row, and
        one for each token after it."""
        return len(self.truth.ids) - len(self.truth.prompt_ids) + 1

    def pixel_figures(self, pairs: Iterable[tuple[Tensors, Tensors]]) -> Found:
        """Compare the vision encoder's inputs by name with the reference's, for each image.

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
        """Compare embeddings with the truth's image features among them, as `merge` makes them.

        The text before and after the images is a share of the vocabulary, half on each side.
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

    def end_to_end(self) -> Found:
        """Compare the tokens of the bundle alone, and its prompt id by id."""
        with bundle_runs():
            answer = self.alone(self.runtime, self.request)
        values, detail = self.judge.tokens(answer.tokens)
        ids, truth = answer.prompt_ids, self.truth.prompt_ids
        if ids is None:
            return values, detail
        tokens = len(ids) if answer.prompt_tokens is None else answer.prompt_tokens
        if wrong := max(metrics.unequal(ids, truth), abs(tokens - len(truth))):
            told = f"a prompt of {tokens} tokens, expected {len(truth)}; {wrong} ids differ"
            detail = f"{told}; {detail}" if detail else told
        return values | {"prompt": wrong}, detail


class ProcessorLadder(Ladder[Ours, Theirs]):
    """A ladder of a layout whose image processor gives the ids of an image with its pixels."""

    @abstractmethod
    def process_image(self, rgb: np.ndarray, options: Mapping[str, Any]) -> ProcessedImage:
        """Process one image with the bundle's graph."""

    def prompt_ids(self) -> Found:
        """Compare the ids of each image; those of the text around them belong to the last rung."""
        wrong, details = 0, []
        for ours, truth in self._processed():
            if unequal := metrics.unequal(ours.prompt_ids, truth.ids):
                wrong += unequal
                details.append(f"{len(ours.prompt_ids)} ids, expected {len(truth.ids)}")
        return {"wrong": wrong}, "; ".join(details) or None

    def pixels(self) -> Found:
        """Compare the vision encoder's inputs of each image."""
        return self.pixel_figures((ours.inputs, truth.pixels) for ours, truth in self._processed())

    def _processed(self) -> Iterator[tuple[ProcessedImage, PictureTruth]]:
        """Process each image with the bundle, and pair it with the reference's result."""
        for picture, truth in zip(self.request.pictures, self.truth.pictures, strict=True):
            with bundle_runs():
                processed = self.process_image(picture.rgb, self.request.options)
            yield processed, truth


@dataclass(frozen=True)
class Refused:
    """A request that the reference refuses, in the place of its ladder.

    Attributes:
        name: the request's name.
        reason: why the reference refuses it.
        rung: the rung of its row, which is the one that runs the bundle alone.
        alone: runs the bundle alone, from images and messages to tokens.
    """

    name: str
    reason: str
    rung: str
    alone: Callable[[], object]

    def climb(self, precision: str) -> Iterator[Row]:
        """Make one row, which passed where the bundle refuses the request too."""
        try:
            with bundle_runs():
                self.alone()
        except BrokenError as error:
            detail = f"both refuse it; transformers: {self.reason}; the bundle: {error}"
            yield Row(self.name, precision, self.rung, (), detail=detail)
            return
        told = f"transformers refuses it ({self.reason}), the bundle answers"
        yield Row(self.name, precision, self.rung, (), error=told, code=ONLY_BUNDLE_ANSWERS)


def prompt_of(
    request: Request,
    manifest: Manifest,
    prompter: Prompter,
    pictures: Sequence[Int[np.ndarray, " T"]],
) -> Int[np.ndarray, " S"]:
    """Make the ids of a request's prompt with the bundle's template and tokenizer.

    Args:
        pictures: the ids of each image.

    Raises as the runtime does.
    """
    asked = manifest.prompt.caption if request.is_caption else request.messages
    chat = check_messages(asked, [picture.rgb for picture in request.pictures])
    return prompter.splice(prompter.ids(chat.messages), list(pictures))


def feature_figures(
    pairs: Iterable[tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]],
) -> Found:
    """Compare features with the truth: by each measure, the worst of all pairs (ours, truth)."""
    found = [closeness(ours, truth)[0] for ours, truth in pairs]
    if not found:
        return {"worst": 0.0, "typical": 0.0, "cosine": 1.0}, "no picture"
    return worst_of(found), None


def worst_of(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Take the worst of several values of each measure: the least cosine, else the largest."""
    return {
        name: (metrics.least if name == "cosine" else metrics.largest)(one[name] for one in found)
        for name in found[0]
    }


def embedding_figures(
    ours: Float[np.ndarray, "S D"], truth: Float[np.ndarray, "S D"]
) -> dict[str, float]:
    """Compare rows of the embedding by every measure that some precision has a limit on."""
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
    """Compare rows by every measure of distance; the last `tail` rows as logits too."""
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
    """Ask the reference about a request, for as many new tokens as the bundle makes."""
    return Truth.of(reference, request, max_new_tokens(manifest), manifest.prompt.image_token_id)


def climb_all(
    kind: type[Ladder[Any, Any]],
    reference: Reference,
    bundle: Bundle,
    precisions: Sequence[str],
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """Climb one kind of ladder for every precision and every request.

    One precision is run at a time, so that only its sessions are in memory next to the reference.

    Args:
        progress: called before and after each rung with (done rungs, all rungs, what is next).

    Raises SourceError for a reference of another kind of model.
    """
    tell = progress or (lambda done, total, what: None)
    total = len(kind.rungs) * len(requests) * len(precisions)
    ask = kind.prepare(reference, bundle, precisions)
    prepared: list[Callable[[Any], Ladder[Any, Any] | Refused]] = []
    for number, request in enumerate(requests):
        tell(0, total, f"reference, {request.name}")
        try:
            prepared.append(ask(request, (number, len(requests))))
        except RefusedError as refusal:
            prepared.append(_refused(kind, request, str(refusal)))
    rows: list[Row] = []
    for precision in precisions:
        with closing(kind.open(bundle, precision)) as runtime:
            for request, ladder_on in zip(requests, prepared, strict=True):
                tell(len(rows), total, f"{precision}, {request.name}")
                for row in ladder_on(runtime).climb(precision):
                    rows.append(row)
                    tell(len(rows), total, f"{precision}, {request.name}")
    return tuple(rows)


def _refused(
    kind: type[Ladder[Any, Any]], request: Request, reason: str
) -> Callable[[Any], Refused]:
    """Return a function from the bundle's side to a Refused."""
    rung = kind.rungs[-1].name
    return lambda runtime: Refused(request.name, reason, rung, lambda: kind.alone(runtime, request))
