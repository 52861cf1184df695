"""Tokens to text, piece by piece, never half a character.

A piece is the difference between two decodes of a short window of tokens that begins at a clean
boundary (the 'prefix offset' of vLLM and text-generation-inference): so leading spaces that a
decoder strips at the start of a text are stripped once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # byte fallback: a token for one byte


class TextStream:
    """Decode tokens as they come; all pieces together equal the decode of all tokens."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip = skip_special_tokens
        self.tokens: list[int] = []
        self._start = 0  # the window begins here
        self._read = 0  # tokens before this have been given out
        self._in_bytes = False  # the last tokens are bytes, perhaps of one run

    def push(self, token: int) -> str:
        """The text that is certain with this token; '' while a character is incomplete.

        A byte token holds back the whole run of bytes: the decoder judges a run as one, and a
        special token that it skips does not end it.
        """
        self.tokens.append(token)
        is_byte = BYTE_TOKEN.fullmatch(self.tokenizer.id_to_token(token) or "") is not None
        self._in_bytes = is_byte or (self._in_bytes and not self._decode([token]))
        if self._in_bytes:
            return ""
        given, text = self._window()
        if len(text) <= len(given) or text.endswith(REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self.tokens)
        return text[len(given) :]

    def finish(self) -> str:
        """The rest, with incomplete characters as the decoder writes them."""
        given, text = self._window()
        self._start = self._read = len(self.tokens)
        return text[len(given) :]

    def _window(self) -> tuple[str, str]:
        window = self.tokens[self._start :]
        return self._decode(window[: self._read - self._start]), self._decode(window)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=self.skip)
