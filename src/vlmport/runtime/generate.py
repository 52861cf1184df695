"""The generation loop: requests in, tokens out, the rows of all requests in one batch.

A request is prefilled once, into one row of the cache. From then on each of its rows feeds one
token per step, all rows of all requests in one call of the decoder, and each request's search
chooses from the logits of its rows. Requests come and go between steps.

The state is the choices of each request (`Request.choices`) and the contents of each row of the
cache (`Generation._rows`). Each changes in one assignment, after the work that it records, and
everything else is derived from them. So a KeyboardInterrupt at any point leaves requests that can
be read, and a generation that can go on: the interrupted work is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vlmport.runtime.graphs.cache import KeyValueCache, SavedRow
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import Request, check_fits_context

if TYPE_CHECKING:
    from jaxtyping import Float32

Made = TypeVar("Made")
FIRST_CAPACITY = 256  # new tokens that the cache has room for before it first grows


@dataclass(frozen=True)
class _ActiveRow:
    """The contents of one row of the cache.

    They are a request's prompt and the tokens of its row `index` after `applied` choices, without
    the last token, which is fed next.
    """

    request: Request
    index: int = 0
    applied: int = 0

    @property
    def length(self) -> int:
        return self.request.length + self.applied - 1

    @property
    def continues_alone(self) -> bool:
        """Whether its request has only this row, and keeps it."""
        fresh = self.request.choices[self.applied :]
        return not self.request.done and all(choice.parents == (0,) for choice in fresh)

    @property
    def token(self) -> int:
        """The last token, which is fed next."""
        return self.request.choices[self.applied - 1].tokens[self.index]


class Generation:
    """Run requests, those given and those added later, until all are done.

    Attributes:
        seconds: time spent in 'prefill' and in 'decode'.
        failed: the error of each request whose search raised one, where `isolate` is set; such a
            request is cancelled.
    """

    def __init__(
        self, components: Components, requests: Iterable[Request] = (), *, isolate: bool = False
    ):
        """Args:
            isolate: after an error of one request's search, go on with the other requests instead
                of raising it.

        Raises PromptError for a request that may exceed the context, before anything runs.
        """
        requests = list(requests)
        for request in requests:
            check_fits_context(components, request)
        self.components = components
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.failed: dict[Request, Exception] = {}
        self._isolate = isolate
        self._rows = [_ActiveRow(request) for request in requests]  # by row of the cache
        longest = max((request.length for request in requests), default=0)
        ahead = min(FIRST_CAPACITY, max((one.max_new_tokens for one in requests), default=1))
        rows = sum(request.search.rows for request in requests)
        limit = components.manifest.dims.context_length
        self.cache = KeyValueCache(components.decoder, rows, longest + ahead, limit)

    def add(self, request: Request) -> None:
        """Add one more request; a later step prefills it.

        Raises PromptError where it may exceed the context.
        """
        check_fits_context(self.components, request)
        self._rows = [*self._rows, _ActiveRow(request)]

    def join(self, request: Request, row: SavedRow) -> None:
        """Add a request whose prompt was prefilled elsewhere and whose first token is chosen.

        Args:
            row: keys and values of the whole prompt; they are copied.
        """
        at = len(self._rows)
        self.cache.reserve_rows(at + 1)
        self.cache.reserve(request.length + min(FIRST_CAPACITY, request.max_new_tokens) - 1)
        self.cache.restore(at, row)
        self.cache.rope_deltas[at] = request.rope_delta
        self._rows = [*self._rows, _ActiveRow(request)]

    @property
    def requests(self) -> list[Request]:
        """The requests that are not done, in no order."""
        return list(dict.fromkeys(row.request for row in self._rows if not row.request.done))

    @property
    def done(self) -> bool:
        return all(row.request.done for row in self._rows)

    def save(self, request: Request) -> SavedRow:
        """Copy what the cache contains of a request: its prompt, and its new tokens without the
        last one if it has one row.

        Works at any time, after an interrupt too, until the step after the request's last one.
        """
        at = next(at for at, row in enumerate(self._rows) if row.request is request)
        made = max(0, len(request.choices) - 1) if request.search.rows == 1 else 0
        saved = self.cache.save(at)
        return saved.first(min(saved.length, request.length + made))

    def run(self) -> None:
        """Generate to the end. After an interrupt it goes on where it stopped."""
        while not self.done:
            self.step()

    def __iter__(self) -> Iterator[Request]:
        """Yield each request each time it has new tokens, until all are done."""
        while not self.done:
            yield from self.step()

    def step(self) -> list[Request]:
        """Prefill one waiting request, or decode one step of all; return those that advanced."""
        waiting = [
            at
            for at, row in enumerate(self._rows)
            if not row.request.choices and not row.request.done
        ]
        if waiting:
            return [self._timed("prefill", self._prefill, waiting[0])]
        return self._timed("decode", self._decode)

    def _prefill(self, at: int) -> Request:
        """Run a request's prompt, and choose its first token."""
        request = self._rows[at].request
        self.cache.reserve_rows(len(self._rows))
        self.cache.lengths[at], self.cache.rope_deltas[at] = 0, request.rope_delta
        if request.prefix is not None:
            self.cache.restore(at, request.prefix)
            self.cache.rope_deltas[at] = request.rope_delta
        logits = self.cache.prefill(at, request.embeds, request.positions)
        self._choose(request, logits)
        return request

    def _choose(self, request: Request, logits: Float32[np.ndarray, "n V"]) -> None:
        try:
            request.choose(logits)
        except Exception as error:
            if not self._isolate:
                raise
            self.failed[request] = error
            request.cancel()

    def _decode(self) -> list[Request]:
        """Add one token to each row, or several to a single row whose draft was right."""
        self._place()
        rows = self._rows
        if not rows:
            return []
        for at, row in enumerate(rows):
            self.cache.lengths[at] = row.length
            self.cache.rope_deltas[at] = row.request.rope_delta
        if len(rows) == 1 and (draft := rows[0].request.draft()):
            return [self._verify_draft(rows[0], draft)]
        last = np.array([[row.token] for row in rows], np.int64)
        logits = self.cache.step(self.components.embed(last))
        if len(rows) == 1:
            self._choose(rows[0].request, logits)
            return [rows[0].request]
        places: dict[Request, list[int]] = {}
        for at, row in sorted(enumerate(rows), key=lambda pair: pair[1].index):
            places.setdefault(row.request, []).append(at)
        for request, own in places.items():
            adjacent = own == list(range(own[0], own[0] + len(own)))  # then a view is enough
            self._choose(request, logits[own[0] : own[-1] + 1] if adjacent else logits[own])
        return list(places)

    def _verify_draft(self, row: _ActiveRow, draft: list[int]) -> Request:
        """Run a speculative draft in one call, and keep the tokens that the search chooses too."""
        request = row.request
        embeds = self.components.embed(np.array([[row.token, *draft]], np.int64))[0]
        logits = self.cache.prefill(0, embeds, keep=0)
        for i, drafted in enumerate([*draft, None]):
            self.cache.lengths[0] = row.length + i + 1
            self._choose(request, logits[i : i + 1])
            if request.done or request.choices[-1].tokens[0] != drafted:
                break
        return request

    def _place(self) -> None:
        """Move the rows that go on to the first rows of the cache, as the last choices say.

        Rows of finished requests and dropped beams go; a row with two continuations is copied. For
        example, request A has three beams, B is done and C is greedy. A chose the parents
        (1, 1, 0): its new rows A0 and A1 continue the old A1, its new row A2 the old A0.

            row of the cache      0    1    2    3    4
            contents before      A0   A1   A2   B0   C0
            new rows                    A0   A1   A2   C0
            their sources               1    1    0    4
            contents after       A2   A0   A1   C0

        A2 and A0 stay where their sources are. A1 needs a copy of row 1 and gets the free row 2:
        only the tokens since the old A1 and A2 parted are copied (`_shared_tokens`). C0 is copied
        to row 3, the last free one of the first four.
        """
        before = self._rows
        if len(before) == 1 and before[0].continues_alone:
            self._rows = [_ActiveRow(before[0].request, 0, len(before[0].request.choices))]
            return
        at = {(row.request, row.index): place for place, row in enumerate(before)}
        applied = {row.request: row.applied for row in before if not row.request.done}
        after, sources = [], []
        for request, start in applied.items():
            fresh = request.choices[start:]
            ancestors = [index for other, index in at if other is request]
            if fresh:
                ancestors = list(fresh[0].parents)
                for choice in fresh[1:]:
                    ancestors = [ancestors[parent] for parent in choice.parents]
            for index, ancestor in enumerate(ancestors if fresh else sorted(ancestors)):
                after.append(_ActiveRow(request, index, len(request.choices)))
                sources.append(at[request, ancestor])
        rows = self.cache.reorder(sources, lambda a, b: _shared_tokens(before, a, b))
        self._rows = [one for _, one in sorted(zip(rows, after, strict=True), key=lambda p: p[0])]

    def _timed(self, phase: str, work: Callable[..., Made], *args: Any) -> Made:
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.seconds[phase] += time.perf_counter() - start


def _shared_tokens(rows: Sequence[_ActiveRow], source: int, target: int) -> int:
    """Count the tokens that two rows have in common: the prompt, and what two rows of one request
    have until they parted."""
    if target >= len(rows) or rows[target].request is not rows[source].request:
        return 0
    one, other = rows[source].index, rows[target].index
    step, request = rows[source].applied, rows[source].request
    while step and one != other:
        step -= 1
        parents = request.choices[step].parents
        one, other = parents[one], parents[other]
    return request.length + step
