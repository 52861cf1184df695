"""The loop: prompts in, tokens out, many rows together.

A row's tokens are the only state. The cache's lengths follow from them before each step, and why
a row stopped is computed from them; so a KeyboardInterrupt at any point leaves rows that are
right, and a generation that can go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from vlmport.errors import DeviceError, OptionError, PromptError
from vlmport.runtime.cache import KeyValueCache
from vlmport.runtime.components import Components
from vlmport.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64

StopReason = Literal["stop", "length"]
Made = TypeVar("Made")
FIRST_CAPACITY = 256  # new tokens that the cache has room for before it first grows


@dataclass
class Row:
    """One sequence.

    Attributes:
        embeds: the prompt's embeddings, image features written in.
        positions: of the prompt's tokens; None counts from 0.
        offset: what the next position is beyond the number of tokens.
        tokens: what has been generated, the stop token included.
    """

    embeds: Float[np.ndarray, "S D"]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    min_new_tokens: int = 0
    positions: Int64[np.ndarray, "... S"] | None = None
    offset: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the row is finished: a stop token, or its length; None while it is not."""
        if self.tokens and self.tokens[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None

    def choose(self, scores: Float32[np.ndarray, " V"]) -> int:
        """The next token id. Each row may mask its own scores, in place.

        Raises DeviceError for scores that are not numbers.
        """
        if len(self.tokens) < self.min_new_tokens:
            scores[[token for token in self.stop_token_ids if token < len(scores)]] = -np.inf
        token = int(scores.argmax())
        if not np.isfinite(scores[token]):
            raise DeviceError(
                f"the decoder's scores are not finite at token {len(self.tokens)}",
                hint="`vlmport inspect --probe` tries this device; another precision may work",
            )
        return token


class Generation:
    """Generate for all rows: prompts run one by one, then all rows step together.

    Attributes:
        rows: in the order given, finished or not.
        seconds: time spent in 'prefill' and in 'decode'.
    """

    def __init__(self, components: Components, rows: Sequence[Row]):
        """Raises PromptError for a row that may leave the context, before anything runs."""
        limit = components.manifest.dims.context_length
        for row in rows:
            room = room_for_tokens(components, len(row.embeds))
            if row.max_new_tokens > room:
                raise PromptError(
                    f"{row.max_new_tokens} tokens after {len(row.embeds)}, the model's context is "
                    f"{limit}",
                    hint=f"at most {room}",
                )
        self.components = components
        self.rows = list(rows)
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._slots = list(rows)  # the row in each slot of the cache
        longest = max((len(row.embeds) for row in rows), default=0)
        ahead = min(FIRST_CAPACITY, max((row.max_new_tokens for row in rows), default=0))
        self.cache = KeyValueCache(components.decoder, len(rows), longest + ahead, limit)

    @property
    def done(self) -> bool:
        return all(row.stop_reason for row in self.rows)

    def run(self) -> None:
        """Generate to the end. After an interrupt it goes on where it stopped."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[tuple[Row, int]]:
        """Each row and its next token, as they come."""
        for slot, row in enumerate(self._slots):
            if not row.tokens:
                yield row, self._timed("prefill", self._prefill, slot, row)
        while not self.done:
            yield from self._timed("decode", self._step)

    def _prefill(self, slot: int, row: Row) -> int:
        """Run a row's prompt; its first token."""
        self.cache.lengths[slot] = 0
        self.cache.offsets[slot] = row.offset
        scores = self.cache.prefill(slot, row.embeds, row.positions)
        token = row.choose(scores[-1])
        row.tokens.append(token)
        return token

    def _step(self) -> list[tuple[Row, int]]:
        """One token more for each row that is not finished."""
        self._compact()
        slots = self._slots
        for slot, row in enumerate(slots):
            self.cache.lengths[slot] = len(row.embeds) + len(row.tokens) - 1
        last = np.array([[row.tokens[-1]] for row in slots], np.int64)
        logits = self.cache.step(self.components.embed(last))
        made = []
        for row, scores in zip(slots, logits, strict=True):
            token = row.choose(scores)
            row.tokens.append(token)
            made.append((row, token))
        return made

    def _compact(self) -> None:
        """Move live rows to the front of the cache, so that finished ones cost nothing.

        Only slots of finished rows are written, and the list changes last: an interrupt on the
        way loses nothing.
        """
        slots = self._slots
        live = [slot for slot, row in enumerate(slots) if not row.stop_reason]
        if len(live) == len(slots):
            return
        kept = slots[: len(live)]
        holes = (slot for slot, row in enumerate(kept) if row.stop_reason)
        for source in live:
            if source >= len(live):
                target = next(holes)
                self.cache.copy_row(source, target)
                kept[target] = slots[source]
        self._slots = kept

    def _timed(self, phase: str, work: Callable[..., Made], *args: Any) -> Made:
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.seconds[phase] += time.perf_counter() - start


def room_for_tokens(components: Components, tokens: int) -> int:
    """How many new tokens the context allows after a prompt of so many.

    Raises PromptError for a prompt that is empty or longer than the context.
    """
    limit = components.manifest.dims.context_length
    if not tokens:
        raise PromptError("the prompt is empty", hint="give it a text or a picture")
    if tokens > limit:
        raise PromptError(
            f"the prompt has {tokens} tokens, the model's context is {limit}",
            hint="fewer or smaller pictures, or a shorter prompt",
        )
    return limit - tokens + 1  # the last token is never fed back


def most_new_tokens(components: Components, tokens: int, options: GenerationOptions) -> int:
    """How many tokens a prompt of so many may be answered with: what is asked for, else the
    bundle's default, and no more than the context allows.

    Raises PromptError as `room_for_tokens` does, OptionError where that is below min_new_tokens.
    """
    room = room_for_tokens(components, tokens)
    wanted = options.max_new_tokens or components.manifest.generation.max_new_tokens
    least = options.min_new_tokens
    if least > room:
        raise OptionError(
            f"min_new_tokens={least}, the context allows {room} after a prompt of {tokens} tokens",
            hint="lower it, or give fewer or smaller pictures or a shorter prompt",
        )
    if least > wanted:
        raise OptionError(
            f"min_new_tokens={least} is more than this model's default max_new_tokens={wanted}",
            hint=f"give max_new_tokens too, at least {least}",
        )
    return min(wanted, room)


def new_row(
    components: Components, embeds: Float[np.ndarray, "S D"], options: GenerationOptions
) -> Row:
    """A row under the bundle's stop tokens. Raises as `most_new_tokens` does."""
    return Row(
        embeds,
        max_new_tokens=most_new_tokens(components, len(embeds), options),
        stop_token_ids=frozenset(components.manifest.generation.stop_token_ids),
        min_new_tokens=options.min_new_tokens,
    )
