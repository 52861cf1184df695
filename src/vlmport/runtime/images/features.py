"""Cache image features by content, so that an image is encoded once."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.content_store import ContentStore
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.graphs.components import Components

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

MAX_BYTES = 256 * 1024 * 1024
INPUT = "input."  # in the names of arrays in a file: an output of the image processor


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

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays of an encoded image by name."""
        inputs = {f"{INPUT}{name}": value for name, value in self.inputs.items()}
        return {"prompt_ids": self.prompt_ids, "features": self.rows, **inputs}

    @classmethod
    def from_arrays(
        cls, key: bytes, arrays: Mapping[str, np.ndarray], needed: Collection[str]
    ) -> PromptImage:
        """Make an encoded image of its arrays. Raises ValueError where they are not those of one.

        Args:
            needed: the inputs that positions are computed from.
        """
        ids, features = arrays["prompt_ids"], arrays["features"]
        inputs = {
            name.removeprefix(INPUT): value
            for name, value in arrays.items()
            if name.startswith(INPUT)
        }
        if ids.ndim != 1 or ids.dtype != np.int64 or features.ndim != 2:
            raise ValueError(f"prompt_ids {list(ids.shape)}, features {list(features.shape)}")
        if inputs.keys() != set(needed):
            raise ValueError(f"inputs of positions: {', '.join(inputs) or 'none'}")
        return cls(key, ids, inputs, features)


class FeatureCache:
    """The most recently used images, up to `max_bytes` of features; 0 keeps none.

    Threads may share it. Images are encoded outside of the store's lock, so an image that two
    threads ask for at the same time may be encoded twice.

    Attributes:
        store: what keeps the features; it may be shared with other values.
        hits, misses: how often an image was in the cache, and how often it was encoded.
    """

    def __init__(
        self, components: Components, max_bytes: int = MAX_BYTES, store: ContentStore | None = None
    ):
        """Args:
            max_bytes: size of a store of its own.
            store: a store to use instead.

        Raises OptionError unless `max_bytes` is a whole number of at least 0.
        """
        self.components = components
        size = whole_number("image_cache_bytes", max_bytes, 0)
        self.store = ContentStore(size) if store is None else store
        self.hits = self.misses = 0
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
        if image.features is not None:
            self._count(hits=1)
            self.store.put({image.key: image})
            return image
        features = self.components.encode_image(image.inputs)
        needed = self.components.position_inputs
        inputs = {name: value for name, value in image.inputs.items() if name in needed}
        image = PromptImage(image.key, image.prompt_ids, inputs, features)
        self._count(misses=1)
        self.store.put({image.key: image})
        return image

    def _count(self, hits: int = 0, misses: int = 0) -> None:
        with self._lock:
            self.hits += hits
            self.misses += misses

    def _find(self, key: bytes) -> PromptImage | None:
        def read(arrays: Mapping[str, np.ndarray]) -> PromptImage:
            return PromptImage.from_arrays(key, arrays, self.components.position_inputs)

        return self.store.get(key, PromptImage, read)

    @property
    def max_bytes(self) -> int:
        """Maximum size of the store in bytes."""
        return self.store.max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self.store.max_bytes = value

    @property
    def nbytes(self) -> int:
        """Size of the store in bytes."""
        return self.store.nbytes

    def clear(self) -> None:
        """Remove all images."""
        self.store.clear()


def content_hash(
    rgb: UInt8[np.ndarray, "H W 3"], options: Mapping[str, Any] | None = None
) -> bytes:
    """Compute the SHA-256 of shape, options and pixels."""
    header = json.dumps([rgb.shape, dict(options or {})], sort_keys=True, default=repr)
    digest = hashlib.sha256(header.encode() + b"\0")
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()
