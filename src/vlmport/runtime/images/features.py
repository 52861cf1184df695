"""Image features by content, so that a picture that was seen is not encoded again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.graphs.components import Components

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Picture:
    """A picture whose place in the prompt is known.

    Attributes:
        inputs: what the image processor gave; once there are features, only what positions are
            computed from.
    """

    key: bytes
    prompt_ids: Int64[np.ndarray, " T"]
    inputs: Mapping[str, np.ndarray]
    features: Float[np.ndarray, "T D"] | None

    @property
    def rows(self) -> Float[np.ndarray, "T D"]:
        """The features of an encoded picture."""
        assert self.features is not None, "not encoded yet"
        return self.features

    @property
    def nbytes(self) -> int:
        arrays = [self.prompt_ids, *self.inputs.values(), self.features]
        return sum(array.nbytes for array in arrays if array is not None)


class FeatureCache:
    """The most recently used pictures, up to `max_bytes` of features; 0 keeps none.

    Threads may share it. What is kept and counted changes under a lock; pictures are encoded
    outside it, so that one that two threads ask for at the same time may be encoded twice.

    Attributes:
        options: of the image processor, for every picture; those of a call count before them.
        hits, misses: how often a picture was here, and how often it was encoded.
    """

    def __init__(self, components: Components, max_bytes: int = MAX_BYTES):
        """Raises OptionError where `max_bytes` is no whole number from 0 on."""
        self.components = components
        self.max_bytes = whole_number("image_cache_bytes", max_bytes, 0)
        self.options: Mapping[str, Any] = {}
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def process(
        self, rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
    ) -> Picture:
        """Run the image processor, unless the picture is known. Its prompt ids are then known,
        so that a prompt can be refused before the vision encoder has cost anything."""
        options = {**self.options, **(options or {})}
        key = content_hash(rgb, options)
        if (kept := self._find(key)) is not None:
            return kept
        processed = self.components.process_image(rgb, options)
        return Picture(key, processed.prompt_ids, processed.inputs, None)

    def encoded(self, picture: Picture) -> Picture:
        """The picture with its features and without its pixels, from the cache or from the vision
        encoder. One that was encoded before stays so, in the cache or not."""
        if picture.features is None:
            picture = self._find(picture.key) or picture
        known = picture.features is not None
        if not known:
            features = self.components.encode_image(picture.inputs)
            needed = self.components.position_inputs
            left = {name: value for name, value in picture.inputs.items() if name in needed}
            picture = Picture(picture.key, picture.prompt_ids, left, features)
        with self._lock:
            self.hits += known
            self.misses += not known
            self._keep(picture)
        return picture

    def _find(self, key: bytes) -> Picture | None:
        with self._lock:
            return self._kept.get(key)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(picture.nbytes for picture in self._kept.values())

    def _keep(self, picture: Picture) -> None:
        """Put a picture last, in place of what had its key; needs the lock."""
        if picture.nbytes > self.max_bytes:
            return
        self._kept[picture.key] = picture
        self._kept.move_to_end(picture.key)
        size = self._size()  # added up each time: an interrupt can't leave a wrong count
        while size > self.max_bytes:
            size -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


def content_hash(
    rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
) -> bytes:
    """SHA-256 of shape, options and pixels."""
    told = json.dumps([rgb.shape, dict(options or {})], sort_keys=True, default=repr)
    digest = hashlib.sha256(told.encode() + b"\0")
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()
