"""What a family answers. Generic code asks these questions and never which family it has."""

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

# Old configs carry sampling options, which clients would apply beside generation_config.json's.
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
    """A sub-config without the sampling options of transformers 4."""
    return {key: value for key, value in config.items() if key not in SAMPLING_KEYS}


def decoder_dims(text: DecoderConfig) -> Dims:
    """What runtimes need to know of a Llama-type decoder."""
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
    """The small files that make a bundle a Hub repository.

    Attributes:
        config, preprocessor_config, processor_config: the JSON files of those names; None for
            none.
        generation_config: likewise.
        chat_template: Jinja; written beside the tokenizer and into tokenizer_config.json. None
            for none.
        new_tokens: special tokens to add to the tokenizer, in the order of their ids.
        pipeline_tag: the Hub's name of the task.
        description: what the model is, such as 'an image captioner'.
        image_before_text: whether transformers.js's processor of the class takes pictures as its
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
# Component → the file that 'auto' stands for on the CPU ⇒ further JSON files by name.
ClientFiles = Callable[[Mapping[str, str]], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Layout:
    """A form of folder that a family is written in: which graphs, where, and the files beside them.

    Attributes:
        fixed_graphs: component → graph, for the components of one form for every precision.
        graphs: component → graph at a precision, in the order in which they are written.
        hub_files: the small files.
        paths: component → its path; `{suffix}` is the precision's. Those without one lie in
            onnx/ under their own names.
        shared: component → the component, written before it, whose weights of the same name are
            its own. These then lie in that one's data files, once, in its folder or a folder
            below: ONNX Runtime follows no path upwards.
        client_files: what only this layout's client reads, such as which graphs to open.
        image_tokens: the tokens of a picture, where all have one size; no image options then.
    """

    fixed_graphs: Callable[[], Graphs]
    graphs: Callable[[Precision], Graphs]
    hub_files: Callable[[], HubFiles]
    paths: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    client_files: ClientFiles = lambda files: {}
    image_tokens: int | None = None

    def path(self, component: str, suffix: str) -> str:
        """Where a component's graph lies in the folder."""
        path = self.paths.get(component, "onnx/{component}{suffix}.onnx")
        return path.format(component=component, suffix=suffix)


@dataclass(frozen=True)
class SizedLayout:
    """A layout whose graphs take pictures of one size, which is said at export.

    Attributes:
        default: where nobody says one.
        at: the layout at a size. Raises ExportError for one that the model can't take.
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
        """All tensors under the names of the graphs' modules, adapters merged. Reads no data.

        Raises WeightError, AdapterError.
        """

    def with_weights(self, tensors: Mapping[str, LazyTensor]) -> Self:
        """The family with what its weights say where config.json says otherwise: a head of its
        own."""
        return self

    @abstractmethod
    def is_unused(self, key: str) -> bool:
        """Whether no graph is meant to need this tensor (a head that nobody reads)."""

    @abstractmethod
    def fixed_graphs(self) -> Graphs:
        """Of the Hub's layout: component → graph, where one form serves every precision."""

    @abstractmethod
    def graphs(self, precision: Precision) -> Graphs:
        """Of the Hub's layout: component → graph at a precision."""

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
        """The image processor's inputs beside the picture, with their defaults."""
        return {}

    @property
    def golden_options(self) -> Mapping[str, Any]:
        """Of those, what the golden picture has otherwise: the fewest tokens."""
        return {}

    @abstractmethod
    def golden_tokens(self, height: int, width: int) -> int:
        """The tokens that a picture of this size takes under these options."""

    @abstractmethod
    def hub_files(self) -> HubFiles: ...
