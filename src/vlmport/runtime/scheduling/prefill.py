"""Run a prompt chunk by chunk, in a cache of its own.

A decoder that rounds by call (`Decoder.rounds_by_call`) gets the chunks of `KeyValueCache.prefill`,
any other gets smaller ones where rows are writing, so that they wait for less. Either way the
logits are those that the prompt has alone. When the last chunk ran, the row is copied into the
cache of the running rows.

Trap: a token that is alone in a tile of the attention has other last bits. No chunk ends in such a
token, unless the prompt alone does: then its last chunk is the one that it has alone.
"""

from __future__ import annotations

import dataclasses

from vlmport.runtime.graphs.cache import CHUNK, KeyValueCache, SavedRow, prompt_cuts
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.decoder import Decoder
from vlmport.runtime.request import Request


def cut_freely_until(decoder: Decoder, length: int) -> int:
    """Return up to which token a prompt may be cut anywhere without another bit in its logits.

    It is the length of the prompt, or the start of its last chunk where that ends in a token that
    is alone in a tile.
    """
    start = prompt_cuts(length)[-2]
    return start if (length - start) % decoder.attention_tile == 1 else length


class Prefill:
    """A prompt that is being run.

    Attributes:
        done: whether the last chunk ran and the first token is chosen.
    """

    def __init__(self, components: Components, request: Request):
        limit, decoder = components.manifest.dims.context_length, components.decoder
        self._request, self._at, self.done = request, 0, False
        self._cache = KeyValueCache(decoder, 1, request.length, limit)
        past = request.length - len(request.embeds)
        self._cuts, self._tile = self._cache.cuts(len(request.embeds)), None
        if decoder.on_host and not decoder.rounds_by_call:
            free = cut_freely_until(decoder, request.length) - past
            assert free >= 0, "the prefix is longer than a prompt may reuse"
            self._cuts, self._tile = [free, len(request.embeds)], decoder.attention_tile
        if request.prefix is not None:
            self._cache.restore(0, request.prefix)
            # Its tensors are in the cache now; only the length is asked for from here on.
            request.prefix = dataclasses.replace(request.prefix, tensors=())
        self._cache.rope_deltas[0] = request.rope_delta

    def next_size(self, limit: int = CHUNK) -> int:
        """Return the number of tokens of the next chunk; more than `limit` where it must be.

        Args:
            limit: at least 3.
        """
        left = next(cut for cut in self._cuts if cut > self._at) - self._at
        if self._tile is None or self._at == self._cuts[0] != self._cuts[-1]:
            return left
        sizes = range(min(limit, left), 1, -1)
        return next(size for size in sizes if size % self._tile != 1 and left - size != 1)

    def advance(self, limit: int = CHUNK) -> int:
        """Run one chunk and return its number of tokens; after the last one, choose a token.

        Raises what the decoder and `Request.choose` raise.
        """
        request, size = self._request, self.next_size(limit)
        part = slice(self._at, self._at + size)
        positions = None if request.positions is None else request.positions[..., part]
        logits = self._cache.prefill(0, request.embeds[part], positions)
        self._at += size
        if self._at == len(request.embeds):
            request.choose(logits)
            self.done = True
        return size

    @property
    def row(self) -> SavedRow:
        """Keys and values of what ran so far, as views of this cache's memory."""
        used = self._cache.lengths[0]
        views = tuple(buffer[0, :, :used] for buffer in self._cache.buffers)
        return SavedRow(used, self._request.rope_delta, views)
