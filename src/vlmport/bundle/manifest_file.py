"""Read, validate and write vlmport.json, here and nowhere else.

Its schema, `vlmport.schema.json` in this folder, is generated from `manifest.py`.
"""

from __future__ import annotations

import functools
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import fastjsonschema

from vlmport.bundle.checks import contradictions
from vlmport.bundle.layouts import HUB, LAYOUTS
from vlmport.bundle.manifest import Manifest
from vlmport.bundle.records import from_json, to_json
from vlmport.errors import BundleError, cut, some_problems
from vlmport.files.json_files import load_json

MANIFEST = "vlmport.json"
FORMAT = "vlmport"
VERSION = 1


def read_manifest(path: Path) -> Manifest:
    """Read and validate vlmport.json. Raises BundleError."""
    try:
        is_there = path.is_file()
    except OSError as error:  # a name that is too long, a folder without permission
        raise BundleError(
            f"{cut(str(path.parent))}: {error.strerror or error}",
            hint="check the folder's permissions",
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
    return _check_references(from_json(Manifest, raw), path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Validate and write vlmport.json; a reader sees the old file or the new, never half.

    Raises BundleError for values that no reader accepts, such as numbers that are not finite.
    """
    raw = {"format": FORMAT, "version": VERSION} | to_json(manifest)
    try:
        _validator()(raw)
        text = json.dumps(raw, indent=1, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:  # the schema's errors are ValueErrors too
        raise BundleError(
            f"{folder / MANIFEST}: can't be written: {error}",
            hint="the file is unchanged; JSON has no NaN and no infinity",
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
    return fastjsonschema.compile(json.loads(text, object_hook=_without_description))


def _without_description(part: dict[str, Any]) -> dict[str, Any]:
    """The part of the schema that validates: compiling the descriptions too takes 5 ms more."""
    return {key: of for key, of in part.items() if key != "description" or isinstance(of, dict)}


def _check_references(manifest: Manifest, path: Path) -> Manifest:
    """Check what a schema can't say. Raises BundleError."""
    if problems := contradictions(manifest):
        raise BundleError(
            f"{path}: {some_problems(problems)}",
            hint="export the bundle again",
            code="bundle.malformed",
        )
    return manifest
