"""Cache image features by content, so that an image is encoded once."""

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
class PromptImage:
    """A processed image, whose tokens in the prompt are known.

    Attributes:
        key: the content hash of its pixels and options.
        inputs: the image processor's outputs; once the image is encoded, only those that the
            positions are computed from.
        features: None until the image is encoded.
    """

    key: bytes
    prompt_ids: Int64[np.ndarray, " T"]
    inputs: Mapping[str, np.ndarray]
    features: Float[np.ndarray, "T D"] | None

    @property
    def rows(self) -> Float[np.ndarray, "T D"]:
        """The features of an encoded image."""
        assert self.features is not None, "not encoded yet"
        return self.features

    @property
    def nbytes(self) -> int:
        arrays = [self.prompt_ids, *self.inputs.values(), self.features]
        return sum(array.nbytes for array in arrays if array is not None)


class FeatureCache:
    """The most recently used images, up to `max_bytes` of features; 0 keeps none.

    Threads may share it. Its contents and counters change under a lock; images are encoded outside
    of the lock, so an image that two threads ask for at the same time may be encoded twice.

    Attributes:
        hits, misses: how often an image was in the cache, and how often it was encoded.
    """

    def __init__(self, components: Components, max_bytes: int = MAX_BYTES):
        """Raises OptionError unless `max_bytes` is a whole number of at least 0."""
        self.components = components
        self.max_bytes = whole_number("image_cache_bytes", max_bytes, 0)
        self.hits = self.misses = 0
        self._images: OrderedDict[bytes, PromptImage] = OrderedDict()
        self._lock = threading.Lock()

    def process(
        self, rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
    ) -> PromptImage:
        """Run the image processor, unless the image is in the cache.

        The image's prompt ids are known afterwards, so a prompt that is too long can be refused
        before the vision encoder runs.
        """
        options = options or {}
        key = content_hash(rgb, options)
        if (found := self._find(key)) is not None:
            return found
        processed = self.components.process_image(rgb, options)
        return PromptImage(key, processed.prompt_ids, processed.inputs, None)

    def encoded(self, image: PromptImage) -> PromptImage:
        """Return the image with its features and without its pixels, from the cache or from the
        vision encoder. An image that is encoded already is returned as it is."""
        if image.features is None:
            image = self._find(image.key) or image
        known = image.features is not None
        if not known:
            features = self.components.encode_image(image.inputs)
            needed = self.components.position_inputs
            inputs = {name: value for name, value in image.inputs.items() if name in needed}
            image = PromptImage(image.key, image.prompt_ids, inputs, features)
        with self._lock:
            self.hits += known
            self.misses += not known
            self._add(image)
        return image

    def _find(self, key: bytes) -> PromptImage | None:
        with self._lock:
            return self._images.get(key)

    @property
    def nbytes(self) -> int:
        """The number of bytes in the cache."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(image.nbytes for image in self._images.values())

    def _add(self, image: PromptImage) -> None:
        """Put an image into the cache, perhaps again; needs the lock."""
        if image.nbytes > self.max_bytes:
            return
        self._images[image.key] = image
        self._images.move_to_end(image.key)
        size = self._size()  # summed each time, so that an interrupt can't leave a wrong count
        while size > self.max_bytes:
            size -= self._images.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Remove all images."""
        with self._lock:
            self._images.clear()


def content_hash(
    rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
) -> bytes:
    """Compute the SHA-256 of shape, options and pixels."""
    header = json.dumps([rgb.shape, dict(options or {})], sort_keys=True, default=repr)
    digest = hashlib.sha256(header.encode() + b"\0")
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()
