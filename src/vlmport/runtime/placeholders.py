"""Tell the placeholders that a template writes from texts that spell one.

A template writes the placeholder of an image as a literal of its own source. The same template
with a mark in place of that literal writes the mark where an image is, and leaves every text as it
is: what a text spells, alone, after a filter or together with its neighbours, is then no mark. A
copy of the tokenizer knows the mark in place of the placeholder, so that a text which spells
`<image>` is encoded as ordinary characters.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlmport.errors import TokenizerError

FILE = "tokenizer.json"


def free_mark(text: str) -> str:
    """A mark that does not occur in a text: private characters round a number."""
    marks = (f"\ue0f0{number}\ue0f1" for number in itertools.count())
    return next(mark for mark in marks if mark not in text)


def renamed_tokenizer(folder: Path, names: Mapping[str, str]) -> Tokenizer:
    """The folder's tokenizer with other names for some added tokens; all ids stay the same.

    Raises TokenizerError where the ids can't stay the same.
    """
    raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
    ids = {}
    for token in raw.get("added_tokens") or ():
        if (name := names.get(token["content"])) is not None:
            ids[name] = token["id"]
            token.update(content=name, normalized=False)
    _rename_in_model(raw["model"], names)
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    moved = [name for name, id_ in ids.items() if tokenizer.token_to_id(name) != id_]
    if moved or ids.keys() != set(names.values()):
        raise TokenizerError(
            f"{folder / FILE}: a text spells {' or '.join(map(repr, names))}, which this tokenizer "
            "can't encode as ordinary characters",
            hint="take it out of the text",
            code="tokenizer.placeholder-in-text",
        )
    return tokenizer


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """The model's own entries of these tokens, which a text could come to otherwise."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): id_ for token, id_ in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        model["merges"] = [one for one in model["merges"] if not _makes(one, names)]


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return not names.keys().isdisjoint((left, right, left + right))
