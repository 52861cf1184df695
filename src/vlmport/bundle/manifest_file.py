"""Read, validate and write vlmport.json, here and nowhere else.

Its schema is `vlmport.schema.json` in this folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import fastjsonschema

from vlmport.bundle.checks import contradictions
from vlmport.bundle.hashing import FileEntry
from vlmport.bundle.layouts import HUB, LAYOUTS
from vlmport.bundle.manifest import (
    CacheLayout,
    Dims,
    GenerationSpec,
    Golden,
    GoldenExpectation,
    GoldenImage,
    Manifest,
    PixelSpec,
    PromptSpec,
    Variant,
)
from vlmport.errors import BundleError, cut, some_problems
from vlmport.files.json_files import load_json

MANIFEST = "vlmport.json"
VERSION = 1


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
    text = resources.files("vlmport.bundle").joinpath("vlmport.schema.json").read_text("utf-8")
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
