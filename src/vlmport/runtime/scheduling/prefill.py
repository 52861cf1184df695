"""Run a prompt chunk by chunk, in a cache of its own.

The chunks are those of `KeyValueCache.prefill`, so the logits are those that the prompt has alone.
When the last chunk ran, the row is copied into the cache of the running rows.
"""

from __future__ import annotations

import dataclasses
import itertools

from vlmport.runtime.graphs.cache import KeyValueCache, SavedRow
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.request import Request


class Prefill:
    """A prompt that is being run.

    Attributes:
        done: whether the last chunk ran and the first token is chosen.
    """

    def __init__(self, components: Components, request: Request):
        limit = components.manifest.dims.context_length
        self._request, self.done = request, False
        self._cache = KeyValueCache(components.decoder, 1, request.length, limit)
        if request.prefix is not None:
            self._cache.restore(0, request.prefix)
            # Its tensors are in the cache now; only the length is asked for from here on.
            request.prefix = dataclasses.replace(request.prefix, tensors=())
        self._cache.rope_deltas[0] = request.rope_delta
        cuts = self._cache.cuts(len(request.embeds))
        self._sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
        self._chunks = self._cache.prefill_chunks(0, request.embeds, request.positions)

    def advance(self) -> int:
        """Run one chunk and return its number of tokens; after the last one, choose a token.

        Raises what the decoder and `Request.choose` raise.
        """
        logits = next(self._chunks)
        size = self._sizes.pop(0)
        if not self._sizes:
            self._request.choose(logits)
            self.done = True
        return size

    @property
    def row(self) -> SavedRow:
        """Keys and values of what ran so far, as views of this cache's memory."""
        used = self._cache.lengths[0]
        views = tuple(buffer[0, :, :used] for buffer in self._cache.buffers)
        return SavedRow(used, self._request.rope_delta, views)
