"""The manifest of a bundle: what vlmport.json says, as dataclasses.

Everything that a runtime has to know of a model is in the manifest or in the graphs' own inputs and
outputs; `family` is for people. `manifest_file.py` reads, validates and writes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmport.bundle.hashing import FileEntry
from vlmport.bundle.layouts import HUB
from vlmport.bundle.precisions import choose, complete


@dataclass(frozen=True)
class Variant:
    """One component at one precision: its graph and the graph's external data files."""

    model: str
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dims:
    """Sizes of the decoder that a runtime needs before it has run anything."""

    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class CacheLayout:
    """How the cache tensors are named and laid out: `past + rest` becomes `present + rest`."""

    past: str = "past_key_values."
    present: str = "present."
    axes: tuple[str, ...] = ("batch_size", "num_key_value_heads", "sequence_length", "head_dim")


@dataclass(frozen=True)
class PromptSpec:
    """How pictures stand in a prompt."""

    image_placeholder: str
    placeholder_token_id: int
    image_token_id: int
    caption: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class GenerationSpec:
    """When to stop, and the defaults of generation_config.json."""

    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int
    processors_see_prompt: bool
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class PixelSpec:
    """Which filter the image processor resizes with, and whose pixels it gives."""

    resample: str
    equals: str


@dataclass(frozen=True)
class GoldenImage:
    """A small RGB picture: base64 of height × width × 3 bytes."""

    width: int
    height: int
    rgb: str


@dataclass(frozen=True)
class GoldenExpectation:
    """Greedy tokens, and the first logits at some ids (float32), within `tolerance`."""

    tokens: tuple[int, ...]
    logit_ids: tuple[int, ...]
    logits: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True)
class Golden:
    """A fixed input of at least 64 tokens of prefill, and what each precision gives for it.

    A shorter prefill would not see the known fault of WebGPU attention (it starts at 32 rows).

    Attributes:
        options: of the image processor, where they are not the defaults.
    """

    image: GoldenImage
    copies: int
    prefill_tokens: int
    expected: Mapping[str, GoldenExpectation]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Manifest:
    """The contents of vlmport.json, version 1."""

    producer: str
    name: str
    family: str
    components: Mapping[str, Mapping[str, Variant]]
    auto: Mapping[str, Mapping[str, str]]
    files: Mapping[str, FileEntry]
    dims: Dims
    cache: CacheLayout
    prompt: PromptSpec
    generation: GenerationSpec
    pixels: PixelSpec
    golden: Golden
    parity: Mapping[str, Any] | None = None
    layout: str = HUB
    accuracy: tuple[Mapping[str, Any], ...] = ()
    image_options: Mapping[str, Any] = field(default_factory=dict)
    ignored_weights: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Manifest({self.name!r}, family={self.family!r}, layout={self.layout!r}, "
            f"precisions={self.precisions}, {len(self.files)} files)"
        )

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in which every component exists, in the order of SUFFIXES."""
        return complete(self.components)

    def choose(self, precision: str, device: str = "cpu") -> dict[str, str]:
        """Component → precision for a request: 'auto', 'fp32', 'int8', or 'vision=q4,…'.

        Raises BundleError for a precision that the bundle does not hold.
        """
        return choose(self.components, self.auto, precision, device)

    def files_of(self, choice: Mapping[str, str]) -> tuple[str, ...]:
        """All files but the graphs (and their data) that this choice of precisions leaves out."""
        chosen = {
            name
            for component, precision in choice.items()
            for variant in (self.components[component][precision],)
            for name in (variant.model, *variant.data)
        }
        return tuple(name for name in self.files if name in chosen or not _is_graph(name))


def _is_graph(name: str) -> bool:
    """A graph, or a part of its external data."""
    return ".onnx" in name.rpartition("/")[2]
