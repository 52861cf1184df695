"""The interface of a family. Generic code uses it, and never asks which family it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from vlmport.bundle import CacheLayout, Dims, GenerationSpec, PixelSpec, PromptSpec
from vlmport.bundle.layouts import HUB, ImageSize
from vlmport.bundle.manifest import Filter
from vlmport.checkpoint import Checkpoint, LazyTensor
from vlmport.graph.builder import GraphBuilder
from vlmport.graph.decoder_config import DecoderConfig
from vlmport.graph.pillow_resize import PILLOW_VERSION, Resample
from vlmport.graph.precision import Precision

# Old configs have sampling options, which clients would apply besides generation_config.json's.
SAMPLING_KEYS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "remove_invalid_values",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)

FILTERS: Mapping[Resample, Filter] = {
    Resample.LANCZOS: "lanczos",
    Resample.BILINEAR: "bilinear",
    Resample.BICUBIC: "bicubic",
}


def without_sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the sampling options of transformers 4 from a sub-config."""
    return {key: value for key, value in config.items() if key not in SAMPLING_KEYS}


def decoder_dims(text: DecoderConfig) -> Dims:
    """Return the sizes of a Llama-type decoder that runtimes need."""
    return Dims(
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_key_value_heads=text.kv_heads,
        head_dim=text.head_size,
        vocab_size=text.vocab_size,
        context_length=text.max_position_embeddings,
    )


def pixel_spec(resample: int) -> PixelSpec:
    """The manifest's entry for an image processor, by Pillow's code of its filter."""
    return PixelSpec(FILTERS[Resample(resample)], f"Pillow {PILLOW_VERSION}")


@dataclass(frozen=True)
class HubFiles:
    """The contents of the small files that make a bundle a Hub repository.

    Attributes:
        config, preprocessor_config, processor_config: the JSON files of those names; None for
            none.
        generation_config: likewise.
        chat_template: Jinja; written into chat_template.jinja and tokenizer_config.json. None for
            none.
        new_tokens: special tokens to add to the tokenizer, in the order of their ids.
        pipeline_tag: the Hub's name of the task.
        description: what the model is, such as 'an image captioner'.
        image_before_text: whether transformers.js's processor of the class takes images as its
            first argument, and text as its second.
    """

    config: Mapping[str, Any]
    preprocessor_config: Mapping[str, Any]
    processor_config: Mapping[str, Any] | None
    generation_config: Mapping[str, Any]
    chat_template: str | None
    new_tokens: tuple[str, ...]
    pipeline_tag: str
    description: str
    image_before_text: bool = False


Graphs = dict[str, GraphBuilder]
# (Component → the file that 'auto' means on the CPU) → further JSON files by name.
ClientFiles = Callable[[Mapping[str, str]], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Layout:
    """A form of folder for a family: its graphs, their paths, and the small files.

    Attributes:
        fixed_graphs: component → graph, for components with one form for every precision.
        graphs: component → graph at a precision, in the order in which they are written.
        hub_files: the small files.
        paths: component → its path; `{suffix}` is the precision's. The others are in onnx/ under
            their own names.
        shared: component → the component, written before it, whose weights of the same name it
            uses. They are stored once, in that component's data files, which are in the same folder
            or below: ONNX Runtime follows no path upwards.
        client_files: files that only this layout's client reads, such as which graphs to open.
        image_tokens: number of tokens of an image, if all images have one size; there are no image
            options then.
    """

    fixed_graphs: Callable[[], Graphs]
    graphs: Callable[[Precision], Graphs]
    hub_files: Callable[[], HubFiles]
    paths: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    client_files: ClientFiles = lambda files: {}
    image_tokens: int | None = None

    def path(self, component: str, suffix: str) -> str:
        """Return the path of a component's graph in the folder."""
        path = self.paths.get(component, "onnx/{component}{suffix}.onnx")
        return path.format(component=component, suffix=suffix)


@dataclass(frozen=True)
class SizedLayout:
    """A layout whose graphs take images of one size, which is chosen at export.

    Attributes:
        default: the default size.
        at: size → layout. Raises ExportError for a size that the model can't take.
    """

    default: ImageSize
    at: Callable[[ImageSize], Layout]


class Family(ABC):
    """A model family, read from one checkpoint: its config, graphs, weight names and prompt."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read and check the configuration. Raises ConfigError, TokenizerError."""

    @abstractmethod
    def weights(self, checkpoint: Checkpoint, adapter: Path | None) -> Mapping[str, LazyTensor]:
        """Map the names of the graphs' modules to tensors, with adapters merged. Reads no data.

        Raises WeightError, AdapterError.
        """

    def with_weights(self, tensors: Mapping[str, LazyTensor]) -> Self:
        """Return the family with the facts of its weights, if they contradict config.json: whether
        the head is a matrix of its own."""
        return self

    @abstractmethod
    def is_unused(self, key: str) -> bool:
        """Return whether no graph is meant to need this tensor (a head without use)."""

    @abstractmethod
    def fixed_graphs(self) -> Graphs:
        """Write the Hub layout's components that have one form for every precision."""

    @abstractmethod
    def graphs(self, precision: Precision) -> Graphs:
        """Write the Hub layout's other components at a precision."""

    @property
    def layouts(self) -> Mapping[str, Layout | SizedLayout]:
        """Layouts by name (vlmport.bundle.layouts). Every family has the Hub's."""
        return {HUB: Layout(self.fixed_graphs, self.graphs, self.hub_files)}

    @property
    @abstractmethod
    def dims(self) -> Dims: ...

    @property
    @abstractmethod
    def prompt(self) -> PromptSpec: ...

    @property
    @abstractmethod
    def generation(self) -> GenerationSpec: ...

    @property
    @abstractmethod
    def pixels(self) -> PixelSpec: ...

    @property
    def cache(self) -> CacheLayout:
        return CacheLayout()

    @property
    def image_options(self) -> Mapping[str, Any]:
        """The image processor's inputs other than the image, with their defaults."""
        return {}

    @property
    def golden_options(self) -> Mapping[str, Any]:
        """Image options for the golden image, chosen to keep it small."""
        return {}

    @abstractmethod
    def golden_tokens(self, height: int, width: int) -> int:
        """Count the tokens of an image of this size, with these options."""

    @abstractmethod
    def hub_files(self) -> HubFiles: ...
