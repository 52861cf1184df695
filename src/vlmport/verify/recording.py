"""Write a result into the bundle: into vlmport.json, and into the model card between its marks.

Trap: in the Hub's cache the files are links to blobs that other snapshots share. A new file takes
the link's place; nothing is ever written through it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path

from vlmport.bundle import CARD, MANIFEST, Bundle, Manifest, write_manifest
from vlmport.errors import BundleError
from vlmport.verify.report import Report, parity_markdown

PARITY = re.compile(rb"(<!-- parity -->\r?\n).*?(\r?\n<!-- /parity -->)", re.DOTALL)


class UnrecordedError(BundleError):
    """The ladder was climbed, but its result can't be written into the bundle.

    Attributes:
        report: the result.
    """

    def __init__(self, message: str, *, report: Report, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.report = report


def record(bundle: Bundle, report: Report) -> Bundle:
    """Put a result into the model card and into vlmport.json.

    Both are written beside the old ones first, which then are replaced one right after the other.
    Raises UnrecordedError where the folder can't be written; then the bundle is as it was.
    """
    folder = bundle.folder
    manifest = dataclasses.replace(bundle.manifest, parity=report.to_json())
    try:
        with tempfile.TemporaryDirectory(prefix=".parity-", dir=folder) as partial:
            for name in _write(bundle.path(CARD), manifest, Path(partial)):
                os.replace(Path(partial, name), folder / name)
    except OSError as error:
        raise UnrecordedError(
            f"{folder}: the result can't be written into the bundle: {error.strerror or error}",
            hint="is the folder read-only, or the disk full? --json FILE writes it elsewhere",
            report=report,
        ) from error
    return Bundle(folder, manifest)


def _write(card: Path, manifest: Manifest, folder: Path) -> tuple[str, ...]:
    """The new card, if there is one, and the new manifest; their names in order."""
    write_manifest(folder, manifest)
    if not card.is_file():
        return (MANIFEST,)
    table = parity_markdown(manifest.parity or {}).encode()
    (folder / CARD).write_bytes(PARITY.sub(lambda m: m[1] + table + m[2], card.read_bytes()))
    return CARD, MANIFEST
