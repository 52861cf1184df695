"""The loop: requests in, tokens out, the rows of all of them together.

A request is prefilled once, into one row of the cache. From then on each of its rows feeds one
token a step, all rows of all requests in one call of the decoder, and each request's search
chooses from the logits of its rows. Requests come and go between steps.

The state is what each request has chosen (`Request.choices`) and which row of the cache holds
what (`Generation._held`). Each changes at once, after the work that it stands for, and all else
follows from them. So a KeyboardInterrupt at any point leaves requests that can be
read, and a generation that can go on: what was interrupted is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from vlmport.errors import PromptError
from vlmport.runtime.graphs.cache import KeptRow, KeyValueCache
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import Request, room_for_tokens

Made = TypeVar("Made")
FIRST_CAPACITY = 256  # new tokens that the cache has room for before it first grows


@dataclass(frozen=True)
class _Held:
    """What a row of the cache holds: the prompt of a request, and what its row `index` after
    `applied` choices was made of, but for the last token, which is fed next."""

    request: Request
    index: int = 0
    applied: int = 0

    @property
    def length(self) -> int:
        return self.request.length + self.applied - 1

    @property
    def goes_straight_on(self) -> bool:
        """Whether its request has this one row, and keeps it."""
        fresh = self.request.choices[self.applied :]
        return not self.request.done and all(choice.parents == (0,) for choice in fresh)

    @property
    def token(self) -> int:
        return self.request.choices[self.applied - 1].tokens[self.index]


class Generation:
    """Run requests, those given and those added later, until all are done.

    Attributes:
        seconds: time spent in 'prefill' and in 'decode'.
    """

    def __init__(self, components: Components, requests: Iterable[Request] = ()):
        """Raises PromptError for a request that may leave the context, before anything runs."""
        requests = list(requests)
        for request in requests:
            check_room(components, request)
        self.components = components
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._held = [_Held(request) for request in requests]  # by row of the cache
        longest = max((request.length for request in requests), default=0)
        ahead = min(FIRST_CAPACITY, max((one.max_new_tokens for one in requests), default=1))
        rows = sum(request.search.rows for request in requests)
        limit = components.manifest.dims.context_length
        self.cache = KeyValueCache(components.decoder, rows, longest + ahead, limit)

    def add(self, request: Request) -> None:
        """Take on one more request; a step of its own prefills it.

        Raises PromptError where it may leave the context.
        """
        check_room(self.components, request)
        self._held = [*self._held, _Held(request)]

    @property
    def requests(self) -> list[Request]:
        """Those that are not done, in no order."""
        return list(dict.fromkeys(held.request for held in self._held if not held.request.done))

    @property
    def done(self) -> bool:
        return all(held.request.done for held in self._held)

    def keep(self, request: Request) -> KeptRow:
        """A copy of what the cache holds of a request: of its prompt, and of its new tokens but
        the last where it has one row.

        At any time, after an interrupt too, until the step after the one in which it was done.
        """
        row = next(row for row, held in enumerate(self._held) if held.request is request)
        made = max(0, len(request.choices) - 1) if request.search.rows == 1 else 0
        kept = self.cache.keep(row)
        return kept.first(min(kept.length, request.length + made))

    def run(self) -> None:
        """Generate to the end. After an interrupt it goes on where it stopped."""
        while not self.done:
            self.step()

    def __iter__(self) -> Iterator[Request]:
        """Each request each time it has got on, until all are done."""
        while not self.done:
            yield from self.step()

    def step(self) -> list[Request]:
        """Prefill one request that waits, else decode one step of all; those that got on."""
        waiting = [
            row
            for row, held in enumerate(self._held)
            if not held.request.choices and not held.request.done
        ]
        if waiting:
            return [self._timed("prefill", self._prefill, waiting[0])]
        return self._timed("decode", self._decode)

    def _prefill(self, row: int) -> Request:
        """Run a request's prompt, and choose its first token."""
        request = self._held[row].request
        self.cache.reserve_rows(len(self._held))
        self.cache.lengths[row], self.cache.offsets[row] = 0, request.offset
        if request.prefix is not None:
            self.cache.restore(row, request.prefix)
            self.cache.offsets[row] = request.offset
        logits = self.cache.prefill(row, request.embeds, request.positions)
        request.choose(logits)
        return request

    def _decode(self) -> list[Request]:
        """One token more for each row; several where a lone row guesses right."""
        self._place()
        held = self._held
        if not held:
            return []
        for row, one in enumerate(held):
            self.cache.lengths[row] = one.length
            self.cache.offsets[row] = one.request.offset
        if len(held) == 1 and (guess := held[0].request.guess()):
            return [self._try(held[0], guess)]
        last = np.array([[one.token] for one in held], np.int64)
        logits = self.cache.step(self.components.embed(last))
        if len(held) == 1:
            held[0].request.choose(logits)
            return [held[0].request]
        rows: dict[Request, list[int]] = {}
        for row, one in sorted(enumerate(held), key=lambda pair: pair[1].index):
            rows.setdefault(one.request, []).append(row)
        for request, own in rows.items():
            together = own == list(range(own[0], own[0] + len(own)))  # then a view is enough
            its = logits[own[0] : own[-1] + 1] if together else logits[own]
            request.choose(its)
        return list(rows)

    def _try(self, held: _Held, guess: list[int]) -> Request:
        """Feed a guess after the last token: each choice that it foresaw saves a step."""
        request = held.request
        embeds = self.components.embed(np.array([[held.token, *guess]], np.int64))[0]
        logits = self.cache.prefill(0, embeds, keep=0)
        for i, foreseen in enumerate([*guess, None]):
            self.cache.lengths[0] = held.length + i + 1
            request.choose(logits[i : i + 1])
            if request.done or request.choices[-1].tokens[0] != foreseen:
                break
        return request

    def _place(self) -> None:
        """Give each row that goes on a row of the cache, the first ones, so that what is finished
        costs nothing; copy what goes on twice."""
        before = self._held
        if len(before) == 1 and before[0].goes_straight_on:
            self._held = [_Held(before[0].request, 0, len(before[0].request.choices))]
            return
        at = {(one.request, one.index): row for row, one in enumerate(before)}
        applied = {one.request: one.applied for one in before if not one.request.done}
        after, sources = [], []
        for request, start in applied.items():
            fresh = request.choices[start:]
            ancestors = [index for other, index in at if other is request]
            if fresh:
                ancestors = list(fresh[0].parents)
                for choice in fresh[1:]:
                    ancestors = [ancestors[parent] for parent in choice.parents]
            for index, ancestor in enumerate(ancestors if fresh else sorted(ancestors)):
                after.append(_Held(request, index, len(request.choices)))
                sources.append(at[request, ancestor])

        def shared(source: int, target: int) -> int:
            """The prompt, and the tokens until two rows of a request parted."""
            if target >= len(before) or before[target].request is not before[source].request:
                return 0
            one, other = before[source].index, before[target].index
            step, request = before[source].applied, before[source].request
            while step and one != other:
                step -= 1
                parents = request.choices[step].parents
                one, other = parents[one], parents[other]
            return request.length + step

        rows = self.cache.reorder(sources, shared)
        self._held = [one for _, one in sorted(zip(rows, after, strict=True), key=lambda p: p[0])]

    def _timed(self, phase: str, work: Callable[..., Made], *args: Any) -> Made:
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.seconds[phase] += time.perf_counter() - start


def check_room(components: Components, request: Request) -> None:
    """Raise PromptError where a request may leave the context."""
    room = room_for_tokens(components, request.length)
    if request.max_new_tokens > room:
        raise PromptError(
            f"{request.max_new_tokens} tokens after {request.length}, the model's context is "
            f"{components.manifest.dims.context_length}",
            hint=f"at most {room}",
            code="prompt.too-long",
        )
