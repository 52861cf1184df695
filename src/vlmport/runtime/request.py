"""One prompt, what searches its answer, and how far that has come."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import OptionError, PromptError
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import check_served
from vlmport.runtime.decoding.prompt_lookup import look_up
from vlmport.runtime.decoding.search import Choice, IsStopped, Mask, Search, new_search
from vlmport.runtime.graphs.cache import KeptRow
from vlmport.runtime.graphs.components import Components

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64


@dataclass(frozen=True)
class Lookup:
    """How many tokens to guess from what was there before, see `lookup.py`.

    Attributes:
        until: ids at which a guess ends: what the text can't go on after, or with.
    """

    num_tokens: int
    max_ngram: int
    until: Collection[int] = ()


@dataclass(eq=False)
class Request:
    """One prompt and its search.

    Attributes:
        embeds: the prompt's embeddings, image features written in.
        positions: of the prompt's tokens; None counts on from the prefix, or from 0.
        offset: what the next position is beyond the number of tokens.
        prompt_ids: the prompt's token ids, for look-ups.
        prefix: what the cache held at the end of an earlier request; the prompt continues it. A
            decoder that rounds by all tokens of a call has other last bits then than in one go.
        choices: what the search has chosen, step by step.
    """

    embeds: Float[np.ndarray, "S D"]
    search: Search
    max_new_tokens: int
    positions: Int64[np.ndarray, "... S"] | None = None
    offset: int = 0
    prompt_ids: Int64[np.ndarray, " S"] | None = None
    lookup: Lookup | None = None
    prefix: KeptRow | None = None
    choices: list[Choice] = field(default_factory=list)
    cancelled: bool = False

    @property
    def length(self) -> int:
        """How many tokens the cache holds before the first new one."""
        return len(self.embeds) + (self.prefix.length if self.prefix else 0)

    @property
    def done(self) -> bool:
        return self.cancelled or self.search.done

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the one row of a request has so far, the stop token included; best first of
        several."""
        return self.search.results()[0].tokens if self.search.steps else ()

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> None:
        """One choice more. One that the search made before an interrupt is not made again."""
        if self.search.steps == len(self.choices):
            self.search.choose(logits)
        assert self.search.last is not None
        self.choices.append(self.search.last)

    def cancel(self) -> None:
        """Ask for no more. What it has so far can be read; its rows are free at the next step."""
        self.cancelled = True

    def guess(self) -> list[int]:
        """Tokens that may well follow, to be tried in one call; [] for none."""
        if self.lookup is None:
            return []
        made = [choice.tokens[0] for choice in self.choices]
        room = self.max_new_tokens - len(made) - 1
        prompt = np.zeros(0, np.int64) if self.prompt_ids is None else self.prompt_ids
        ids = np.concatenate([prompt, np.array(made, np.int64)])
        count, longest = min(self.lookup.num_tokens, room), self.lookup.max_ngram
        return look_up(ids, count, longest, until=self.lookup.until) if count > 0 else []


def new_request(
    components: Components,
    embeds: Float[np.ndarray, "S D"],
    options: GenerationOptions,
    *,
    prompt_ids: Int64[np.ndarray, " S"] | None = None,
    positions: Int64[np.ndarray, "... S"] | None = None,
    offset: int = 0,
    prefix: KeptRow | None = None,
    is_stopped: IsStopped | None = None,
    mask: Mask | None = None,
) -> Request:
    """A request under the bundle's stop tokens.

    Args:
        prompt_ids: of the whole prompt, the prefix included; None where only embeddings are known:
            no processor sees a prompt then.
        positions, offset: as in Request.

    Raises as `most_new_tokens` does, and OptionError for options that this prompt or these graphs
    can't serve.
    """
    generation, vocab_size = components.manifest.generation, components.manifest.dims.vocab_size
    length = len(embeds) + (prefix.length if prefix else 0)
    most = most_new_tokens(components, length, options)
    ids = [] if prompt_ids is None else prompt_ids.tolist()
    search = new_search(
        options,
        prompt_ids=ids,
        processors_see_prompt=generation.processors_see_prompt,
        stop_token_ids=generation.stop_token_ids,
        pad_token_id=generation.pad_token_id,
        max_new_tokens=most,
        vocab_size=vocab_size,
        is_stopped=is_stopped,
        mask=mask,
    )
    lookup = None
    if options.prompt_lookup_num_tokens:
        assert search.rows == 1, "options refuse the others"
        _refuse_lookup(components)
        odd = {token for token in ids if token >= vocab_size}
        until = odd | {*generation.stop_token_ids, components.manifest.prompt.image_token_id}
        lookup = Lookup(options.prompt_lookup_num_tokens, options.max_matching_ngram_size, until)
    return Request(embeds, search, most, positions, offset, prompt_ids, lookup, prefix)


def _refuse_lookup(components: Components) -> None:
    """Raise OptionError where tokens that are fed together have other logits than one by one.

    In float32 they differ by the order of sums, in the last bits. In float16 that is enough to
    change a text: it did 3 of 48 with 100 tokens and more.
    """
    decoder = components.decoder
    reason = None
    if decoder.row_by_row:
        reason = "rounds by all tokens of a call"
    elif any(port.dtype == np.float16 for port in decoder.ports):
        reason = "computes in float16, where tokens of one call round otherwise than alone"
    if reason:
        raise OptionError(
            f"prompt_lookup_num_tokens at {components.precision}: this decoder {reason}; a guess "
            "could change the text",
            hint="give the decoder another precision (fp32 or q4), or leave it out",
            code="option.not-for-this-model",
        )


def check_default(components: Components, name: str, value: Any) -> None:
    """Raise OptionError for a default of generation_config.json that this bundle can't serve."""
    generation, vocab_size = components.manifest.generation, components.manifest.dims.vocab_size
    check_served(name, value, vocab_size, generation.processors_see_prompt)
    most = generation.max_new_tokens
    if name in ("min_new_tokens", "min_length") and value > most:  # after a short prompt at least
        raise OptionError(
            f"{name}={value} is more than max_new_tokens={most}", code="option.contradiction"
        )
    if name == "prompt_lookup_num_tokens" and value is not None:
        _refuse_lookup(components)


def room_for_tokens(components: Components, tokens: int) -> int:
    """How many new tokens the context allows after a prompt of so many.

    Raises PromptError for a prompt that is empty or longer than the context.
    """
    limit = components.manifest.dims.context_length
    if not tokens:
        raise PromptError(
            "the prompt is empty", hint="give it a text or a picture", code="prompt.empty"
        )
    if tokens > limit:
        raise PromptError(
            f"the prompt has {tokens} tokens, the model's context is {limit}",
            hint="fewer or smaller pictures, or a shorter prompt",
            code="prompt.too-long",
        )
    return limit - tokens + 1  # the last token is never fed back


def most_new_tokens(
    components: Components, tokens: int, options: GenerationOptions, *, leaves_room: bool = False
) -> int:
    """How many tokens a prompt of so many may be answered with: what is asked for, else the
    bundle's default, and no more than the context allows.

    Raises PromptError as `room_for_tokens` does, and with `leaves_room` where the context allows
    less than is wanted and less than a quarter of itself; OptionError where that is below
    min_new_tokens or nothing at all.
    """
    room, asked = room_for_tokens(components, tokens), options.most_new_tokens(tokens)
    default = components.manifest.generation.max_new_tokens
    least, wanted = options.least_new_tokens(tokens), default if asked is None else asked
    if leaves_room and room < min(wanted, components.manifest.dims.context_length // 4):
        raise PromptError(
            f"a prompt of {tokens} tokens leaves room for {room} in the context",
            hint="a shorter prompt",
            code="prompt.too-long",
        )
    if not wanted:
        raise OptionError(
            f"max_length={options.max_length}, the prompt alone has {tokens} tokens",
            hint="give max_new_tokens, which does not count the prompt",
            code="option.no-room",
        )
    if least > room:
        raise OptionError(
            f"min_new_tokens={least}, the context allows {room} after a prompt of {tokens} tokens",
            hint="lower it, or give fewer or smaller pictures or a shorter prompt",
            code="option.no-room",
        )
    if least > wanted:
        whose = "this model's default max_new_tokens" if asked is None else "max_new_tokens"
        raise OptionError(
            f"min_new_tokens={least} is more than {whose}={wanted}",
            hint=f"give max_new_tokens too, at least {least}",
            code="option.contradiction",
        )
    return min(wanted, room)
