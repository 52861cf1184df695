"""Write a result into the bundle: into vlmport.json, and into the model card between its marks.

Traps:
- In the Hub's cache the files are links to blobs that other snapshots share. A new file takes the
  link's place; nothing is ever written through it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vlmport.bundle.folder import CARD, Bundle
from vlmport.bundle.manifest import Manifest
from vlmport.bundle.manifest_file import MANIFEST, write_manifest


def write_result(bundle: Bundle, manifest: Manifest, sections: Mapping[str, str]) -> Bundle:
    """Replace the manifest and sections of the model card.

    Both are first written to new files, which then replace the old ones, one right after the other.
    A section whose marks are not in the card is not written.

    Args:
        sections: name → Markdown, which goes between `<!-- name -->` and `<!-- /name -->`.

    Raises OSError if the folder can't be written; then the bundle is unchanged.
    """
    with tempfile.TemporaryDirectory(prefix=".recording-", dir=bundle.folder) as partial:
        for name in _write(bundle.path(CARD), manifest, sections, Path(partial)):
            os.replace(Path(partial, name), bundle.folder / name)
    return Bundle(bundle.folder, manifest)


def _write(
    card: Path, manifest: Manifest, sections: Mapping[str, str], folder: Path
) -> tuple[str, ...]:
    """Write the new manifest, and the new card if there is one; return their names in order."""
    write_manifest(folder, manifest)
    if not card.is_file():
        return (MANIFEST,)
    text = card.read_bytes()
    for name, markdown in sections.items():
        text = _between_marks(text, name.encode(), markdown.encode())
    (folder / CARD).write_bytes(text)
    return CARD, MANIFEST


def _between_marks(text: bytes, name: bytes, new: bytes) -> bytes:
    marks = re.compile(rb"(<!-- %b -->\r?\n).*?(\r?\n<!-- /%b -->)" % (name, name), flags=re.DOTALL)
    return marks.sub(lambda match: match[1] + new + match[2], text)
