"""A request: one prompt, the search for its answer, and how far that has come.

Whether a prompt and its answer fit into the context is decided here (`answer_length`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import OptionError, PromptError
from vlmport.runtime.decoding import new_search
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.processors import Mask, check_served
from vlmport.runtime.decoding.prompt_lookup import look_up
from vlmport.runtime.decoding.search import Choice, IsStopped, Search
from vlmport.runtime.graphs.cache import SavedRow
from vlmport.runtime.graphs.components import Components

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64


@dataclass(frozen=True)
class Lookup:
    """How drafts are looked up, see decoding/prompt_lookup.py.

    Attributes:
        until: ids at which a draft ends, because the text can't go on with them or after them.
    """

    num_tokens: int
    max_ngram: int
    until: Collection[int] = ()


@dataclass(eq=False)
class Request:
    """One prompt and its search.

    Attributes:
        embeds: the prompt's embeddings, image features included.
        positions: positions of the prompt's tokens; None counts on from the prefix, or from 0.
        rope_delta: the next position minus the number of tokens so far.
        prompt_ids: the prompt's token ids, for drafts.
        prefix: a saved row of an earlier request, which the prompt continues. The logits of a
            decoder that scales by call then differ in the last bits from those of one call.
        choices: the search's choices, step by step.
    """

    embeds: Float[np.ndarray, "S D"]
    search: Search
    max_new_tokens: int
    positions: Int64[np.ndarray, "... S"] | None = None
    rope_delta: int = 0
    prompt_ids: Int64[np.ndarray, " S"] | None = None
    lookup: Lookup | None = None
    prefix: SavedRow | None = None
    choices: list[Choice] = field(default_factory=list)
    cancelled: bool = False

    @property
    def length(self) -> int:
        """The number of tokens in the cache before the first new one."""
        return len(self.embeds) + (self.prefix.length if self.prefix else 0)

    @property
    def done(self) -> bool:
        return self.cancelled or self.search.done

    @property
    def tokens(self) -> tuple[int, ...]:
        """The new tokens so far, the stop token included; of several rows, those of the best."""
        return self.search.results()[0].tokens if self.search.steps else ()

    def choose(self, logits: Float32[np.ndarray, "n V"]) -> None:
        """Make one more choice, unless the search made it before an interrupt."""
        if self.search.steps == len(self.choices):
            self.search.choose(logits)
        assert self.search.last is not None
        self.choices.append(self.search.last)

    def cancel(self) -> None:
        """Stop. The tokens so far can be read; the next step frees the rows."""
        self.cancelled = True

    def draft(self) -> list[int]:
        """Look up tokens that are likely to follow, to be verified in one call; [] for none."""
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
    max_new_tokens: int | None = None,
    prompt_ids: Int64[np.ndarray, " S"] | None = None,
    positions: Int64[np.ndarray, "... S"] | None = None,
    rope_delta: int = 0,
    prefix: SavedRow | None = None,
    is_stopped: IsStopped | None = None,
    mask: Mask | None = None,
) -> Request:
    """Make a request with the bundle's stop tokens.

    Args:
        max_new_tokens: from `answer_length`; None calls it.
        prompt_ids: ids of the whole prompt, prefix included; None where only embeddings are known:
            then no processor sees a prompt.
        positions, rope_delta: as in Request.

    Raises PromptError and OptionError as `answer_length` does, and OptionError for options that
    don't work with this prompt or these graphs.
    """
    generation, vocab_size = components.manifest.generation, components.manifest.dims.vocab_size
    if max_new_tokens is None:
        length = len(embeds) + (prefix.length if prefix else 0)
        max_new_tokens = answer_length(components, length, options)
    ids = [] if prompt_ids is None else prompt_ids.tolist()
    search = new_search(
        options,
        prompt_ids=ids,
        processors_see_prompt=generation.processors_see_prompt,
        stop_token_ids=generation.stop_token_ids,
        max_new_tokens=max_new_tokens,
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
    return Request(
        embeds, search, max_new_tokens, positions, rope_delta, prompt_ids, lookup, prefix
    )


def _refuse_lookup(components: Components) -> None:
    """Raise OptionError where tokens of one call have other logits than tokens fed one by one.

    In float32 the order of sums changes the last bits only. In float16 that is enough to change a
    text: it changed 3 of 48 texts of 100 tokens and more.
    """
    decoder = components.decoder
    reason = None
    if decoder.row_by_row:
        reason = "scales activations by all tokens of a call"
    elif any(port.dtype == np.float16 for port in decoder.ports):
        reason = "computes in float16, where several tokens in one call round differently"
    if reason:
        raise OptionError(
            f"prompt_lookup_num_tokens at {components.precision}: this decoder {reason}, so a "
            "draft could change the text",
            hint="use another precision for the decoder (fp32 or q4), or leave the option out",
            code="option.not-for-this-model",
        )


def check_default(components: Components, name: str, value: Any) -> None:
    """Raise OptionError for a default of generation_config.json that this bundle can't serve."""
    generation, vocab_size = components.manifest.generation, components.manifest.dims.vocab_size
    check_served(name, value, vocab_size, generation.processors_see_prompt)
    limit = generation.max_new_tokens
    if name in ("min_new_tokens", "min_length") and value > limit:  # after a short prompt at least
        raise OptionError(
            f"{name}={value} is more than max_new_tokens={limit}", code="option.contradiction"
        )
    if name == "prompt_lookup_num_tokens" and value is not None:
        _refuse_lookup(components)


def room_for_tokens(components: Components, tokens: int) -> int:
    """Return the maximum number of new tokens that the context allows after `tokens` tokens.

    Raises PromptError for a prompt that is empty or longer than the context.
    """
    limit = components.manifest.dims.context_length
    if not tokens:
        raise PromptError(
            "the prompt is empty", hint="give it a text or an image", code="prompt.empty"
        )
    if tokens > limit:
        raise PromptError(
            f"the prompt has {tokens} tokens, the model's context is {limit}",
            hint="use fewer or smaller images, or a shorter prompt",
            code="prompt.too-long",
        )
    return limit - tokens + 1  # the last token is never fed back


def answer_length(
    components: Components, tokens: int, options: GenerationOptions, *, leaves_room: bool = False
) -> int:
    """Return the maximum number of new tokens for a prompt of `tokens` tokens.

    It is the number that the options ask for, or the bundle's default, limited by the context.

    Args:
        leaves_room: refuse a prompt after which the context has room for less than that number
            and less than a quarter of itself.

    Raises PromptError for a prompt that does not fit, OptionError where the context or the options
    allow less than min_new_tokens, or no new token.
    """
    room = room_for_tokens(components, tokens)
    asked = options.max_new_tokens_after(tokens)
    default = components.manifest.generation.max_new_tokens
    least, wanted = options.min_new_tokens_after(tokens), default if asked is None else asked
    if leaves_room and room < min(wanted, components.manifest.dims.context_length // 4):
        raise PromptError(
            f"a prompt of {tokens} tokens leaves room for {room} in the context",
            hint="use a shorter prompt",
            code="prompt.too-long",
        )
    if not wanted:
        raise OptionError(
            f"max_length={options.max_length}, but the prompt alone has {tokens} tokens",
            hint="use max_new_tokens, which does not count the prompt",
            code="option.no-room",
        )
    if least > room:
        raise OptionError(
            f"min_new_tokens={least}, but the context allows {room} after a prompt of {tokens} "
            "tokens",
            hint="lower it, or use fewer or smaller images or a shorter prompt",
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


def check_fits_context(components: Components, request: Request) -> None:
    """Raise PromptError for a request that may exceed the context."""
    room = room_for_tokens(components, request.length)
    if request.max_new_tokens > room:
        raise PromptError(
            f"{request.max_new_tokens} new tokens after {request.length}, the model's context is "
            f"{components.manifest.dims.context_length}",
            hint=f"use at most {room} new tokens",
            code="prompt.too-long",
        )
