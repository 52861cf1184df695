"""Log-probabilities as OpenAI writes them, with each token's text and bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from vlmport.runtime.decoding.search import TokenLogprob

REPLACEMENT = "\ufffd"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LEAST = -9999.0  # OpenAI's number for a token that can't be


@functools.cache
def _byte_characters() -> dict[str, int]:
    """Character → byte, of tokenizers that write each byte as a character.

    Source: GPT-2, encoder.py, bytes_to_unicode.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """Return a token's text, and its bytes, which may be half a character."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if REPLACEMENT not in text:
        return text, list(text.encode())
    name = tokenizer.id_to_token(token) or ""
    if (byte := BYTE.fullmatch(name)) is not None:
        return text, [int(byte[1], 16)]
    known = _byte_characters()
    if all(character in known for character in name):
        return text, [known[character] for character in name]
    return text, None


def logprobs_of(
    tokenizer: Tokenizer, reported: Sequence[TokenLogprob] | None, ends_with_stop_token: bool
) -> dict[str, Any] | None:
    """Write log-probabilities, without that of a stop token; None where none were asked for."""
    if reported is None:
        return None
    shown = reported[:-1] if ends_with_stop_token else reported
    content = []
    for one in shown:
        top = [_entry(tokenizer, token, logprob) for token, logprob in one.top]
        content.append({**_entry(tokenizer, one.token, one.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = token_text(tokenizer, token)
    return {"token": text, "bytes": data, "logprob": max(logprob, LEAST)}
