"""The bundle: a folder of ONNX graphs and the manifest that says how to run them.

`vlmport.json` is read, written and validated here and nowhere else. Its schema is
`vlmport.schema.json` beside this file. Everything that a runtime has to know of a model stands
in the manifest or in the graphs' own inputs and outputs; `family` is for people.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import fastjsonschema

from vlmport.bundle_checks import contradictions
from vlmport.errors import BundleError, cut, some_problems
from vlmport.hashing import CHUNK_BYTES as CHUNK_BYTES
from vlmport.hashing import FileEntry, hash_file
from vlmport.json_files import load_json
from vlmport.layouts import HUB, LAYOUTS
from vlmport.precisions import ANY, choose, complete
from vlmport.precisions import DEFAULT_PRECISIONS as DEFAULT_PRECISIONS
from vlmport.precisions import SUFFIXES as SUFFIXES
from vlmport.precisions import split_precisions as split_precisions

MANIFEST = "vlmport.json"
CARD = "README.md"  # people edit it before they publish, so the manifest does not list it
VERSION = 1


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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        check_hashes: bool = False,
        needed: Collection[str] | None = None,
    ) -> Bundle:
        """Read a bundle; sizes of all files are compared, with `check_hashes` the bytes too.

        Args:
            needed: the files that have to be there; None for all.

        Raises BundleError for a missing, malformed, newer, incomplete or altered bundle.
        """
        folder = Path(folder)
        bundle = cls(folder, read_manifest(folder / MANIFEST))
        bundle.check(hashes=check_hashes, needed=needed)
        return bundle

    def check(self, *, hashes: bool = False, needed: Collection[str] | None = None) -> None:
        """Compare the folder with the manifest. Raises BundleError naming every bad file."""
        problems = []
        for name, entry in self.manifest.files.items():
            if needed is not None and name not in needed:
                continue
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif (size := path.stat().st_size) != entry.size:
                problems.append(f"{name}: {size} bytes, expected {entry.size}")
            elif hashes and not _is_as_listed(path, entry):
                problems.append(f"{name}: its SHA-256 is not the manifest's")
        if problems:
            raise BundleError(
                f"{self.folder}: {len(problems)} of {len(self.manifest.files)} files are not as "
                f"{MANIFEST} says: {some_problems(problems)}",
                hint="download or export the bundle again",
                code="bundle.not-as-listed",
            )

    def needs_layout(self, layout: str) -> None:
        """Raise BundleError where the folder is of another layout."""
        if (found := self.manifest.layout) != layout:
            raise BundleError(
                f"{self.folder}: written in the layout {found!r}, expected {layout!r}",
                hint=f"`vlmport export SRC OUT --layout {layout}` writes that one; what runs the "
                "others stands in docs/bundle-format.md",
                code="bundle.other-layout",
            )

    def path(self, name: str) -> Path:
        """The path of a file named in the manifest."""
        return self.folder / name

    def variant(self, component: str, precision: str) -> Variant:
        """The files of a component at a precision (or its only form)."""
        forms = self.manifest.components[component]
        return forms[precision if precision in forms else ANY]


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds a manifest."""
    return (folder / MANIFEST).is_file()


def _is_graph(name: str) -> bool:
    """A graph, or a part of its external data."""
    return ".onnx" in name.rpartition("/")[2]


def _is_as_listed(path: Path, entry: FileEntry) -> bool:
    try:
        return hash_file(path) == entry
    except OSError as error:
        raise BundleError(
            f"{path}: {error.strerror or error}",
            hint="is it readable? is the disk whole?",
            code="bundle.unreadable",
        ) from error


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """The entries of all files below a folder but the manifest and the card, sorted by path."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    return {name: hash_file(folder / name) for name in names if name not in (MANIFEST, CARD)}


def read_manifest(path: Path) -> Manifest:
    """Read and validate vlmport.json. Raises BundleError."""
    try:
        is_there = path.is_file()
    except OSError as error:  # a name too long, a folder that nobody may read
        raise BundleError(
            f"{cut(str(path.parent))}: {error.strerror or error}",
            hint="is it readable?",
            code="bundle.unreadable",
        ) from None
    if not is_there:
        raise BundleError(
            f"{path.parent}: no {MANIFEST}, so this is not a vlmport bundle",
            hint="`vlmport export SRC OUT` writes one",
            code="bundle.no-manifest",
        )
    raw = load_json(path, error=BundleError, hint="download or export again")
    version = raw.get("version")
    if isinstance(version, int | float) and version > VERSION:
        raise BundleError(
            f"{path}: manifest version {version}; this vlmport reads up to {VERSION}",
            hint="pip install --upgrade vlmport",
            code="bundle.newer-version",
        )
    layout = raw.get("layout", HUB)
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise BundleError(
            f"{path}: layout {layout[:40]!r}; this vlmport knows {', '.join(LAYOUTS)}",
            hint="pip install --upgrade vlmport",
            code="bundle.newer-version",
        )
    try:
        _validator()(raw)
    except fastjsonschema.JsonSchemaValueException as error:
        raise BundleError(
            f"{path}: {some_problems([error.message.replace('data', 'manifest', 1)])}",
            hint="the schema is docs/vlmport.schema.json; download or export again",
            code="bundle.malformed",
        ) from error
    return _check_references(_from_json(raw), path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Validate and write vlmport.json; a reader sees the old file or the new, never half.

    Raises BundleError for what no reader would take, such as numbers that are not finite.
    """
    raw = {"format": "vlmport", "version": VERSION} | _plain(dataclasses.asdict(manifest))
    if manifest.layout == HUB:  # the one that readers take for granted
        del raw["layout"]
    if not manifest.accuracy:  # then older readers can read it
        del raw["accuracy"]
    if not manifest.image_options:
        del raw["image_options"]
    if not manifest.ignored_weights:
        del raw["ignored_weights"]
    if not manifest.golden.options:
        del raw["golden"]["options"]
    try:
        _validator()(raw)
        text = json.dumps(raw, indent=1, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:  # the schema's errors are ValueErrors too
        raise BundleError(
            f"{folder / MANIFEST}: can't be written: {error}",
            hint="the file is as it was; JSON has no NaN and no infinity",
            code="bundle.unwritable",
        ) from error
    _check_references(manifest, folder / MANIFEST)
    partial = folder / f".{MANIFEST}.partial"
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def _validator() -> Any:
    text = resources.files("vlmport").joinpath("vlmport.schema.json").read_text("utf-8")
    return fastjsonschema.compile(json.loads(text))


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what is validated is what JSON holds."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _from_json(raw: dict[str, Any]) -> Manifest:
    """The dataclasses from a validated document."""
    golden = raw["golden"]
    expected = {
        precision: GoldenExpectation(
            tuple(one["tokens"]), tuple(one["logit_ids"]), tuple(one["logits"]), one["tolerance"]
        )
        for precision, one in golden["expected"].items()
    }
    prompt, generation, cache = raw["prompt"], raw["generation"], raw["cache"]
    return Manifest(
        producer=raw["producer"],
        name=raw["name"],
        family=raw["family"],
        components={
            component: {
                precision: Variant(one["model"], tuple(one["data"]))
                for precision, one in forms.items()
            }
            for component, forms in raw["components"].items()
        },
        auto=raw["auto"],
        files={
            name: FileEntry(one["size"], one["sha256"], tuple(one["chunks"]))
            for name, one in raw["files"].items()
        },
        dims=Dims(**{field.name: raw["dims"][field.name] for field in dataclasses.fields(Dims)}),
        cache=CacheLayout(cache["past"], cache["present"], tuple(cache["axes"])),
        prompt=PromptSpec(**prompt | {"caption": tuple(prompt["caption"])}),
        generation=GenerationSpec(
            **generation | {"stop_token_ids": tuple(generation["stop_token_ids"])}
        ),
        pixels=PixelSpec(**raw["pixels"]),
        golden=Golden(
            GoldenImage(**golden["image"]),
            golden["copies"],
            golden["prefill_tokens"],
            expected,
            golden.get("options", {}),
        ),
        parity=raw["parity"],
        layout=raw.get("layout", HUB),
        accuracy=tuple(raw.get("accuracy", ())),
        image_options=raw.get("image_options", {}),
        ignored_weights={
            pattern: tuple(names) for pattern, names in raw.get("ignored_weights", {}).items()
        },
    )


def _check_references(manifest: Manifest, path: Path) -> Manifest:
    """What a schema can't say. Raises BundleError."""
    if problems := contradictions(manifest):
        raise BundleError(
            f"{path}: {some_problems(problems)}",
            hint="export the bundle again",
            code="bundle.malformed",
        )
    return manifest
