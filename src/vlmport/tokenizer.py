"""Reading tokenizer.json, a checkpoint's or a bundle's."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from vlmport.errors import TokenizerError

SAVE_AGAIN = "write it with AutoTokenizer.from_pretrained(…).save_pretrained(folder)"


def read_tokenizer(folder: Path, *, hint: str = SAVE_AGAIN) -> Tokenizer:
    """The tokenizer of a folder. Raises TokenizerError with this hint."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{folder}: no tokenizer.json", hint=hint)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault
        raise TokenizerError(f"{path}: {error}", hint=hint) from error


def new_token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id that `token` has, or gets when it is added next."""
    known = tokenizer.token_to_id(token)
    if known is not None:
        return known
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
