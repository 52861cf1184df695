"""The manifest of a bundle: the contents of vlmport.json, as dataclasses.

Everything that a runtime has to know of a model is in the manifest or in the graphs' own inputs and
outputs; `family` is for people. `manifest_file.py` reads, validates and writes the file.

This is the one description of the file. Its JSON schema and its TypeScript types are generated:
`python -m tests.manifest_reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypeAlias, TypedDict

from vlmport.bundle.hashing import FileEntry, Sha256
from vlmport.bundle.layouts import HUB
from vlmport.bundle.precisions import choose, complete
from vlmport.bundle.records import Schema

TokenId: TypeAlias = Annotated[int, Schema(minimum=0)]
Count: TypeAlias = Annotated[int, Schema(minimum=1)]
Dim: TypeAlias = Annotated[int, Schema(minimum=1, maximum=2**31 - 1)]
# Relative, with forward slashes; no part begins with a dot. Without the last group, Python's `$`
# would let a path end with a line feed (fastjsonschema closes that gap in most places, not in all).
BundlePath: TypeAlias = Annotated[
    str, Schema(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$(?!\n)")
]
Filter: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]
ImageOptions: TypeAlias = Mapping[str, bool | float]


@dataclass(frozen=True)
class Variant:
    """One component at one precision: its graph and the graph's external data files."""

    model: BundlePath
    data: tuple[BundlePath, ...] = ()


@dataclass(frozen=True)
class Dims:
    """Sizes of the decoder that a runtime needs before it has run anything."""

    hidden_size: Dim
    num_hidden_layers: Dim
    num_key_value_heads: Dim
    head_dim: Dim
    vocab_size: Dim
    context_length: Dim


@dataclass(frozen=True)
class CacheLayout:
    """The names and axes of the cache tensors: `past + rest` becomes `present + rest`."""

    past: Annotated[str, Schema("prefix of the decoder's cache inputs")] = "past_key_values."
    present: Annotated[
        str, Schema("prefix of its cache outputs; the rest of the name is the same")
    ] = "present."
    axes: Annotated[tuple[str, ...], Schema(minItems=4, maxItems=4)] = (
        "batch_size",
        "num_key_value_heads",
        "sequence_length",
        "head_dim",
    )


class CaptionPart(TypedDict):
    """A part of a caption message: a text, or the place of an image."""

    type: Literal["image", "text"]
    text: NotRequired[str]


class CaptionMessage(TypedDict):
    """One of the messages that ask for a caption."""

    role: Literal["system", "user", "assistant"]
    content: str | list[CaptionPart]


@dataclass(frozen=True)
class PromptSpec:
    """The place of images in a prompt, and the messages that ask for a caption."""

    image_placeholder: Annotated[str, Schema(minLength=1)]
    placeholder_token_id: Annotated[
        TokenId,
        Schema("each occurrence in the tokenized prompt is replaced by one image's prompt_ids"),
    ]
    image_token_id: Annotated[
        TokenId,
        Schema("rows of the embedding with this id are overwritten by image features, in order"),
    ]
    caption: Annotated[
        tuple[CaptionMessage, ...],
        Schema(
            "the messages that ask for a caption of one image; "
            "they hold no image and no name of a file"
        ),
    ]


@dataclass(frozen=True)
class GenerationSpec:
    """When to stop, and the defaults of generation_config.json."""

    stop_token_ids: Annotated[tuple[TokenId, ...], Schema(uniqueItems=True)]
    pad_token_id: TokenId
    max_new_tokens: Count
    processors_see_prompt: Annotated[
        bool, Schema("whether repetition penalty and the like see prompt and image tokens too")
    ]
    defaults: Annotated[Mapping[str, Any], Schema("sampling options of generation_config.json")]


@dataclass(frozen=True)
class PixelSpec:
    """The filter that the image processor resizes with, and the program whose pixels it gives."""

    resample: Filter
    equals: Annotated[
        str, Schema("the program whose pixels the image processor gives, with its version")
    ]


@dataclass(frozen=True)
class GoldenImage:
    """A small RGB image."""

    width: Annotated[int, Schema(minimum=1, maximum=256)]
    height: Annotated[int, Schema(minimum=1, maximum=256)]
    rgb: Annotated[str, Schema("base64 of height * width * 3 bytes")]


@dataclass(frozen=True)
class GoldenExpectation:
    """Greedy tokens, and the first logits at some ids (float32), within `tolerance`."""

    tokens: Annotated[tuple[TokenId, ...], Schema(minItems=1)]
    logit_ids: Annotated[tuple[TokenId, ...], Schema(minItems=1)]
    logits: Annotated[
        tuple[Annotated[float, Schema(minimum=-1e38, maximum=1e38)], ...], Schema(minItems=1)
    ]
    tolerance: Annotated[float, Schema(exclusiveMinimum=0, maximum=1e38)]


@dataclass(frozen=True)
class Golden:
    """A fixed input of at least 64 tokens of prefill, and what each precision gives for it.

    A shorter prefill would not see the known fault of WebGPU attention (it starts at 32 rows).
    """

    image: GoldenImage
    copies: Annotated[
        int,
        Schema("how many times the image is in the prompt", minimum=1, maximum=64),
    ]
    prefill_tokens: Annotated[int, Schema(minimum=64)]
    expected: Annotated[
        Mapping[str, GoldenExpectation],
        Schema("precision → greedy tokens and the first logits"),
    ]
    options: Annotated[
        ImageOptions,
        Schema(
            "the image processor's options for this image, where they are not image_options",
            omit_default=True,
        ),
    ] = field(default_factory=dict)


class Parity(TypedDict):
    """The result of `vlmport verify`."""

    reference: str
    passed: bool
    rows: list[dict[str, Any]]


class Accuracy(TypedDict):
    """The result of `vlmport eval` for one set of images."""

    data: Annotated[str, Schema("the set of images, for people")]
    pictures: Annotated[Count, Schema("number of images")]
    questions: NotRequired[
        Annotated[Count, Schema("number of questions; absent where the images were captioned")]
    ]
    sha256: Sha256
    device: str
    by: Annotated[str, Schema("the programs that measured, with their versions")]
    passed: Annotated[bool, Schema("whether no precision lost more to fp32 than its limit")]
    figures: Annotated[
        Mapping[str, Mapping[str, Annotated[float, Schema(minimum=0, maximum=1000)]]],
        Schema("precision → metric → its mean over all images, times 100"),
    ]
    limits: Annotated[
        Mapping[str, Annotated[float, Schema(minimum=0, maximum=100)]],
        Schema("precision → how many points it may lose to fp32"),
    ]


@dataclass(frozen=True, repr=False)
class Manifest:
    """The contents of vlmport.json, version 1."""

    producer: Annotated[str, Schema("program and version that wrote the bundle")]
    name: str
    family: Annotated[str, Schema("for people; no runtime reads it")]
    components: Annotated[
        Mapping[str, Annotated[Mapping[str, Variant], Schema(minProperties=1)]],
        Schema(
            "component → precision → its files; precision 'any' serves every precision. "
            "The layout says which components there must be"
        ),
    ]
    auto: Annotated[
        Mapping[str, Mapping[str, str]],
        Schema(
            "device (cpu, cuda, webgpu, wasm, …) → component → what precision 'auto' means",
            required=["cpu"],
        ),
    ]
    files: Annotated[
        Mapping[BundlePath, FileEntry],
        Schema(
            "every file of the bundle but vlmport.json and README.md, "
            "by its path with forward slashes"
        ),
    ]
    dims: Annotated[Dims, Schema(additionalProperties=Dim)]
    cache: CacheLayout
    prompt: PromptSpec
    generation: GenerationSpec
    pixels: PixelSpec
    golden: Annotated[
        Golden, Schema("a fixed input and what it must give, to try a device before it is trusted")
    ]
    parity: Annotated[
        Parity | None,
        Schema(
            "the latest result of `vlmport verify`, null before it ran", additionalProperties=True
        ),
    ] = None
    layout: Annotated[
        str,
        Schema(
            "which form of folder; 'hub', that of transformers.js, where it is absent",
            omit_default=True,
        ),
    ] = HUB
    accuracy: Annotated[
        tuple[Accuracy, ...],
        Schema(
            "results of `vlmport eval`, one for each set of images; absent before it ran",
            omit_default=True,
        ),
    ] = ()
    image_options: Annotated[
        ImageOptions,
        Schema(
            "the inputs of image_processor other than `image`, with their defaults; "
            "absent where there are none",
            omit_default=True,
        ),
    ] = field(default_factory=dict)
    ignored_weights: Annotated[
        Mapping[str, Annotated[tuple[str, ...], Schema(minItems=1)]],
        Schema(
            "tensors that an export left out on request: pattern → the checkpoint's tensors that "
            "match it; absent where there are none",
            omit_default=True,
        ),
    ] = field(default_factory=dict)

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
        """Map component → precision for a request: 'auto', 'fp32', 'int8', or 'vision=q4,…'.

        Raises BundleError for a precision that the bundle does not hold.
        """
        return choose(self.components, self.auto, precision, device)

    def files_of(self, choice: Mapping[str, str]) -> tuple[str, ...]:
        """List all files except the graphs (and their data) that this choice leaves out."""
        chosen = {
            name
            for component, precision in choice.items()
            for variant in (self.components[component][precision],)
            for name in (variant.model, *variant.data)
        }
        return tuple(name for name in self.files if name in chosen or not _is_graph(name))


def _is_graph(name: str) -> bool:
    """Return whether a file is a graph, or a part of its external data."""
    return ".onnx" in name.rpartition("/")[2]
