"""Load the processor and the generation settings of a model that was trained with an adapter.

Files in the adapter's folder count before the base's. transformers reads both from one folder,
which is put together here: the adapter's files replace the base's of the same purpose. Which of
several templates counts is transformers' own choice.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

TOKENIZER: tuple[str, ...] = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
IMAGES: tuple[str, ...] = ("processor_config.json", "preprocessor_config.json")
TEMPLATES: tuple[str, ...] = ("chat_template.jinja", "chat_template.json")
FILES: tuple[str, ...] = (*TOKENIZER, *IMAGES, *TEMPLATES)
GENERATION = "generation_config.json"
TEMPLATE = "chat_template"

Load = Callable[[Path], Any]


def with_adapter_processor(load: Load, folder: Path, adapter: Path | None) -> Any:
    """Load a folder's processor with `load`, with the files of the adapter.

    The base's template counts unless the adapter's is a new one: a tokenizer that was saved alone
    carries its own, which the base's processor may have displaced.
    """
    base = load(folder)
    if adapter is None or not any((adapter / name).is_file() for name in FILES):
        return base
    with tempfile.TemporaryDirectory() as name:
        _put_together(folder, adapter, Path(name))
        made = load(Path(name))
    known = (base.chat_template, base.tokenizer.chat_template)
    theirs = made.chat_template or made.tokenizer.chat_template
    made.chat_template = theirs if theirs and theirs not in known else known[0] or known[1]
    return made


def with_adapter_generation(model: Any, adapter: Path | None) -> None:
    """Give the model the adapter's generation_config.json, where there is one."""
    if adapter is not None and (adapter / GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(adapter))


def _put_together(folder: Path, adapter: Path, out: Path) -> None:
    """Copy the base's small files without templates, and then the adapter's over them."""
    replaced = set(TEMPLATES)
    if (adapter / TOKENIZER[0]).is_file():
        replaced.update(TOKENIZER)
    if (adapter / IMAGES[1]).is_file() or "image_processor" in _json(adapter / IMAGES[0]):
        replaced.update(IMAGES)
    for name in ("config.json", *TOKENIZER, *IMAGES):
        if name in replaced or not (folder / name).is_file():
            continue
        if name in (TOKENIZER[1], IMAGES[0]):
            kept = {key: value for key, value in _json(folder / name).items() if key != TEMPLATE}
            (out / name).write_text(json.dumps(kept), encoding="utf-8")
        else:
            shutil.copyfile(folder / name, out / name)
    for name in FILES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / name)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
