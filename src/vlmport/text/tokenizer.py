"""Reading tokenizer.json, a checkpoint's or a bundle's, and encoding a text by it.

Traps:
- The library ends some faults in a Rust panic, which is a BaseException and prints to stderr.
- Its regular expressions do not hear Ctrl-C.
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
AS_PUBLISHED = "is it as its publisher wrote it?"

WORKER = Worker("tokenizer", memory=2 << 30)


def read_tokenizer(folder: Path, *, hint: str = SAVE_AGAIN) -> Tokenizer:
    """The tokenizer of a folder.

    Raises TokenizerError, with this hint where none can be read, and for one that could take all
    time or memory.
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
            _ask(text, "")  # what ends a process when it is read ends that one
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
    """Texts to ids by a tokenizer, which is not changed from now on."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        found = {name: getattr(tokenizer, name) for name in PARTS}
        states = {name: _state(part) for name, part in found.items() if part is not None}
        odd = _is_odd({"type": type(tokenizer.model).__name__, **_settings(tokenizer.model)})
        self._sent = tokenizer.to_str() if odd or not is_usual(states) else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added to it.

        Raises PromptError for a text that the tokenizer has no ids for, or takes too long for.
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
                hint="does it have a token for each character, or one for unknown ones?",
                code="tokenizer.can-not-encode",
            ) from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of one text; see Encoder."""
    return Encoder(tokenizer).encode(text)


def new_token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id that `token` has, or gets when it is added next."""
    known = tokenizer.token_to_id(token)
    if known is not None:
        return known
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _ask(tokenizer: str, text: str) -> list[int]:
    """Encode where it can be killed. A tokenizer is sent once."""
    request = {"name": hashlib.sha256(tokenizer.encode()).hexdigest(), "text": text}
    ids = WORKER.ask(request)
    return WORKER.ask(request | {"tokenizer": tokenizer}) if ids is None else ids


def _is_odd(model: Any) -> bool:
    """Whether a model is of a kind, or has settings, that the library panics on for some text."""
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
    """A part of a tokenizer as tokenizer.json has it; a part of Python code as of no kind."""
    try:
        return json.loads(part.__getstate__())
    except Exception:
        return {"type": None}


def _is_librarys(error: BaseException) -> bool:
    """An error of the library: an Exception, or a panic, whose class can't be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
