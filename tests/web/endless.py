"""Bundles whose chat template never ends, for web/browser/endless.test.ts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from vlmport.bundle import Bundle, hash_folder, write_manifest

FOR_EVER = "for ever?"  # what makes the template that is asked for it go on
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


def endless(bundle: Bundle, folder: Path) -> dict[str, str]:
    """Copy the bundle twice: one template loops always, one where a message says FOR_EVER."""
    asked = (
        "{% for one in messages %}{% for part in one.content %}"
        f"{{% if part.text == '{FOR_EVER}' %}}{LOOP}{{% endif %}}"
        "{% endfor %}{% endfor %}"
    )
    return {
        name: str(with_prologue(bundle, folder / name, prologue))
        for name, prologue in (("always", LOOP), ("asked", asked))
    }


def with_prologue(bundle: Bundle, folder: Path, prologue: str) -> Path:
    """Copy the bundle with this before its template, and the hashes that it then has."""
    shutil.copytree(bundle.folder, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["chat_template"] = prologue + settings["chat_template"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    write_manifest(folder, dataclasses.replace(bundle.manifest, files=hash_folder(folder)))
    return folder
