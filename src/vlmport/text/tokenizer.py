"""Read the tokenizer.json of a checkpoint or a bundle, and encode texts with it.

Traps:
- The library ends some errors in a Rust panic, which is a BaseException and prints to stderr.
- Ctrl-C does not interrupt its regular expressions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlmport.errors import PromptError, TokenizerError, some_problems
from vlmport.files.json_files import load_json
from vlmport.text.killable import MESSAGE, TIME, StoppedError, Worker
from vlmport.text.tokenizer_checks import MAX_BYTES, PARTS, is_usual, problems_of

SAVE_AGAIN = "write it with AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
AS_PUBLISHED = "check that it is as its publisher wrote it"

WORKER = Worker("tokenizer", memory=2 << 30)


def read_tokenizer(folder: Path, *, hint: str = SAVE_AGAIN) -> Tokenizer:
    """Read the tokenizer of a folder.

    Raises TokenizerError, with this hint if none can be read, and for a tokenizer that could take
    forever or all memory.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{folder}: no tokenizer.json", hint=hint, code="tokenizer.missing-file"
        )
    if (size := path.stat().st_size) > MAX_BYTES:
        raise TokenizerError(
            f"{path}: {size} bytes, at most {MAX_BYTES}", hint=AS_PUBLISHED, code=REFUSED
        )
    raw = load_json(path, error=TokenizerError, hint=hint)
    if problems := problems_of(raw):
        raise TokenizerError(
            f"{path}: not read: {some_problems(problems)}", hint=AS_PUBLISHED, code=REFUSED
        )
    text = json.dumps(raw) if not is_usual(raw) or _is_odd(raw.get("model")) else None
    try:
        if text is not None:
            _ask(text, "")  # a tokenizer that crashes its reader crashes that process
            return Tokenizer.from_str(text)
        return Tokenizer.from_file(str(path))
    except StoppedError as error:
        raise TokenizerError(
            f"{path}: reading it was stopped: {error}", hint=AS_PUBLISHED, code=STOPPED
        ) from error
    except BaseException as error:  # the library raises plain Exception, or panics
        if not _is_librarys(error):
            raise
        message = f"{path}: {str(error)[:MESSAGE]}"
        raise TokenizerError(message, hint=hint, code="tokenizer.unreadable") from error


REFUSED, STOPPED = "tokenizer.refused", "tokenizer.stopped"


class Encoder:
    """Encodes texts with a tokenizer, which must not change afterwards."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        found = {name: getattr(tokenizer, name) for name in PARTS}
        states = {name: _state(part) for name, part in found.items() if part is not None}
        odd = _is_odd({"type": type(tokenizer.model).__name__, **_settings(tokenizer.model)})
        self._sent = tokenizer.to_str() if odd or not is_usual(states) else None

    def encode(self, text: str) -> list[int]:
        """Encode a text, without adding tokens.

        Raises PromptError for a text that the tokenizer can't encode, or takes too long for.
        """
        try:
            if self._sent is not None:
                return _ask(self._sent, text)
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except StoppedError as error:
            code = "tokenizer.too-slow" if error.reason == TIME else STOPPED
            raise PromptError(
                f"the tokenizer was stopped: {error}", hint=AS_PUBLISHED, code=code
            ) from error
        except BaseException as error:
            if not _is_librarys(error):
                raise
            raise PromptError(
                f"the tokenizer can't encode this text: {str(error)[:MESSAGE]}",
                hint="use a tokenizer with a token for each character or for unknown ones",
                code="tokenizer.can-not-encode",
            ) from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode one text; see Encoder."""
    return Encoder(tokenizer).encode(text)


def new_token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of `token`, or the id that it would get if it were added."""
    known = tokenizer.token_to_id(token)
    if known is not None:
        return known
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _ask(tokenizer: str, text: str) -> list[int]:
    """Encode in a process that can be killed. A tokenizer is sent once."""
    request = {"name": hashlib.sha256(tokenizer.encode()).hexdigest(), "text": text}
    ids = WORKER.ask(request)
    return WORKER.ask(request | {"tokenizer": tokenizer}) if ids is None else ids


def _is_odd(model: Any) -> bool:
    """Whether the library panics on some texts for this kind of model or its settings."""
    return (
        not isinstance(model, dict)
        or model.get("type") not in ("BPE", "WordLevel", "WordPiece", "Unigram")
        or bool(model.get("continuing_subword_prefix")) != (model["type"] == "WordPiece")
        or bool(model.get("dropout"))
    )


def _settings(model: Any) -> dict[str, Any]:
    names = ("continuing_subword_prefix", "dropout")
    return {name: getattr(model, name, None) for name in names}


def _state(part: Any) -> Any:
    """Return a part of a tokenizer as in tokenizer.json; {"type": None} for Python code."""
    try:
        return json.loads(part.__getstate__())
    except Exception:
        return {"type": None}


def _is_librarys(error: BaseException) -> bool:
    """Whether an error is the library's: an Exception or a panic, whose class can't be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
