"""Use the tokenizer, template, image processor and generation settings saved with an adapter.

Training may have changed them: tokens were added, a template was written, images were made smaller.
So the files in the adapter's folder replace the base's, in whole groups: transformers 5 writes
fewer files than 4 did, and the base's old ones must not fill the gaps. They are compared with the
base's by what the family reads from both, not by bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlmport.checkpoint import Checkpoint, load_json
from vlmport.errors import AdapterError, CheckpointWarning, VlmportError, some_names, warn
from vlmport.families.base import Family
from vlmport.families.generation_config import FILE as GENERATION
from vlmport.families.processor_config import PREPROCESSOR, PROCESSOR
from vlmport.families.templates import JINJA, KEY, LEGACY, NAMED, read_chat_template
from vlmport.text.chat_template import special_tokens
from vlmport.text.tokenizer import read_tokenizer

__all__ = ["with_adapter_files"]

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
# Keys of tokenizer.json that the export sets itself.
SET_BY_EXPORT = ("truncation", "padding", "post_processor", "version")
BYTE_LEVEL = "ByteLevel"  # its decoder takes no settings
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")  # "" is none: transformers 5's

F = TypeVar("F", bound=Family)
Files = Mapping[str, Path | None]


def with_adapter_files(checkpoint: Checkpoint, family: F, adapter: Path) -> tuple[Checkpoint, F]:
    """Return the checkpoint with the files of the adapter's folder, and the family read from it.

    Warns with CheckpointWarning, naming the files, if they differ from the base's. Raises
    AdapterError if they contradict the base's config or weights.
    """
    groups = list(_groups(adapter))
    files: dict[str, Path | None] = {name: path for group in groups for name, path in group.items()}
    texts = _templates(adapter)
    if not files and not texts:
        return checkpoint, family
    named = [*files, *texts]
    try:
        own, new = _own_template(checkpoint), _new_template(checkpoint, adapter, texts)
        taken = checkpoint.with_files(files, new or own)
        made = type(family).read(taken)
        if (adapter / TOKENIZER).is_file():
            _check_rows(checkpoint, taken, made.dims.vocab_size)
        differing = {
            name
            for group in groups
            if _differs(checkpoint, checkpoint.with_files(group, own), family)
            for name, path in group.items()
            if path is not None
        }
    except AdapterError:
        raise
    except VlmportError as cause:
        raise AdapterError(
            f"{adapter}: its {some_names(sorted(set(named)))} do not fit the base model: {cause}",
            hint="use the base model that the adapter was trained on",
            code="adapter.files-contradict",
        ) from cause
    if new is not None:
        differing |= texts.keys()
    if differing:
        warn(
            CheckpointWarning(
                f"{adapter}: the adapter's files replace those of the base model that differ: "
                f"{some_names(differing)}",
                code="adapter.files-differ",
            )
        )
    return taken, made


def _groups(adapter: Path) -> Iterator[Files]:
    """List groups of file name → its path; None for a file of the base that must not be read."""
    yield _group(adapter, TOKENIZER_FILES, whole=(adapter / TOKENIZER).is_file())
    own = (adapter / PREPROCESSOR).is_file() or "image_processor" in _json(adapter / PROCESSOR)
    yield _group(adapter, (PROCESSOR, PREPROCESSOR), whole=own)
    yield _group(adapter, (GENERATION,), whole=False)


def _group(adapter: Path, names: tuple[str, ...], *, whole: bool) -> Files:
    found = {name: adapter / name if (adapter / name).is_file() else None for name in names}
    return found if whole else {name: path for name, path in found.items() if path is not None}


def _own_template(checkpoint: Checkpoint) -> str | None:
    """Read the base's template; None if it has none."""
    return read_chat_template(checkpoint) if _templates(checkpoint.folder) else None


def _new_template(checkpoint: Checkpoint, adapter: Path, texts: Mapping[str, str]) -> str | None:
    """Read the adapter's template; None if it has none, or one that is in any file of the base.

    A tokenizer that was saved alone has its own template, over which the processor's takes
    precedence.
    """
    if not texts:
        return None
    there = dataclasses.replace(checkpoint, folder=adapter, files={}, chat_template=None)
    text = read_chat_template(there)
    known = {_trimmed(one) for one in _templates(checkpoint.folder).values()}
    return None if _trimmed(text) in known else text


def _trimmed(text: str) -> str:
    return text.removesuffix("\n")  # as Jinja reads it


def _templates(folder: Path) -> dict[str, str]:
    """Find file → template in a folder; of several named templates, the default."""
    found: dict[str, str] = {}
    for name in (PROCESSOR, LEGACY, TOKENIZER_CONFIG):
        template = _json(folder / name).get(KEY)
        if isinstance(template, list):
            named = [one for one in template if isinstance(one, dict)]
            template = {one.get("name"): one.get("template") for one in named}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            found[name] = template
    for path in (folder / JINJA, *sorted((folder / NAMED).glob("*.jinja"))):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _json(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}


def _differs(checkpoint: Checkpoint, other: Checkpoint, family: Family) -> bool:
    """Return whether the family reads anything else from the other's files."""
    if all(_same_bytes(checkpoint.path(name), other.path(name)) for name in other.files):
        return False
    try:
        read = type(family).read(other)
    except VlmportError:
        return True
    if _said(read) != _said(family) or _special(other) != _special(checkpoint):
        return True
    return TOKENIZER in other.files and _tokens(other) != _tokens(checkpoint)


def _same_bytes(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _said(family: Family) -> tuple[Any, ...]:
    """Collect the facts of a family that a bundle holds."""
    return family.hub_files(), family.prompt, family.generation, family.pixels, family.image_options


def _special(checkpoint: Checkpoint) -> dict[str, str]:
    return special_tokens(checkpoint.json(TOKENIZER_CONFIG) or {})


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe what a tokenizer does, to compare it.

    transformers 5 writes other values than 4 did for what changes no token.
    """
    raw = json.loads(
        read_tokenizer(checkpoint.tokenizer_folder).to_str(), object_hook=_without_offsets
    )
    for key in SET_BY_EXPORT:
        raw.pop(key, None)
    for key in AFFIXES:
        raw["model"][key] = raw["model"].get(key) or None
    raw["added_tokens"] = sorted(raw["added_tokens"], key=lambda token: token["id"])
    decoder = raw.get("decoder") or {}
    raw["decoder"] = decoder if decoder.get("type") != BYTE_LEVEL else BYTE_LEVEL
    return raw


def _without_offsets(part: dict[str, Any]) -> dict[str, Any]:
    """Remove from a part of tokenizer.json how the tokens' offsets are counted."""
    if part.get("type") == BYTE_LEVEL:
        part.pop("trim_offsets", None)
    return part


def _check_rows(checkpoint: Checkpoint, taken: Checkpoint, rows: int) -> None:
    """Raise AdapterError for new tokens that the embedding has no row for, padding aside."""
    vocabulary = read_tokenizer(taken.tokenizer_folder).get_vocab()
    beyond = {token for token, one in vocabulary.items() if one >= rows}
    beyond -= {
        _special(taken).get("pad_token"),
        *(read_tokenizer(checkpoint.tokenizer_folder).get_vocab() if beyond else ()),
    }
    if beyond:
        count = max(vocabulary.values()) + 1
        raise AdapterError(
            f"{taken.path(TOKENIZER)}: {count} tokens, the base model's embedding has {rows} rows: "
            f"{some_names(beyond)}",
            hint=f"resize the base as in training, model.resize_token_embeddings({count}); then "
            "merge the adapter with peft's merge_and_unload(), and save_pretrained()",
            code="adapter.more-tokens",
        )
