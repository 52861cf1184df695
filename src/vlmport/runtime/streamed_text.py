"""Turn tokens into text piece by piece, never half a character.

A piece is the difference between two decodes of a short window of tokens that begins at a clean
boundary (the 'prefix offset' of vLLM and text-generation-inference), so a leading space that a
decoder strips from a text is stripped once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
HEX = "0123456789ABCDEFabcdef"
BYTE_TOKENS = tuple(f"<0x{a}{b}>" for a, b in itertools.product(HEX, HEX))  # byte fallback


class TextStream:
    """Decode tokens as they come; all pieces together equal the decode of all tokens."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip = skip_special_tokens
        self.tokens: list[int] = []
        self._start = 0  # the window begins here
        self._read = 0  # the text of tokens before this was returned
        self._in_bytes = False  # the last tokens are bytes, perhaps of one run of bytes

    def push(self, token: int) -> str:
        """Add a token, and return the text that is certain now; '' while a character is incomplete.

        A run of byte tokens is held back until it ends: the decoder decodes a run as one, and a
        special token that it skips does not end the run.
        """
        self.tokens.append(token)
        self._in_bytes = token in self._bytes or (self._in_bytes and not self._decode([token]))
        if self._in_bytes:
            return ""
        given, text = self._window()
        if len(text) <= len(given) or text.endswith(REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self.tokens)
        return text[len(given) :]

    @cached_property
    def _bytes(self) -> frozenset[int]:
        """The tokens for single bytes."""
        found = (self.tokenizer.token_to_id(name) for name in BYTE_TOKENS)
        return frozenset(one for one in found if one is not None)

    @property
    def pending(self) -> str:
        """The text that is not certain yet; incomplete characters as the decoder writes them."""
        given, text = self._window()
        return text[len(given) :]

    def finish(self) -> str:
        """Return the rest of the text."""
        rest = self.pending
        self._start = self._read = len(self.tokens)
        return rest

    def _window(self) -> tuple[str, str]:
        window = self.tokens[self._start :]
        return self._decode(window[: self._read - self._start]), self._decode(window)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=self.skip)


class StopStrings:
    """Ends a text at the first of some strings, wherever tokens begin and end.

    The tokens of a stop string are part of the ids, as in Hugging Face's `generate`. The text ends
    before the stop string, and characters that may become one are held back. A stop string may
    contain the text of special tokens (`<|im_end|>`), even where the text does not. It is searched
    in the generated text, not in the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, strings: Sequence[str], *, skip_special_tokens: bool = True
    ):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.strings = tuple(strings)
        # A token may be a single byte; 4 more in front, for decoders that strip a space.
        self._reach = max((len(one.encode()) for one in strings), default=0) + 4

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completes a stop string."""
        window = tokens[-self._reach :]
        text, given = self._raw(window), self._raw(window[:-1]).rstrip(REPLACEMENT)
        return any(text.find(one, max(0, len(given) - len(one) + 1)) >= 0 for one in self.strings)

    def held(self, tokens: Sequence[int], *, ended: bool = False) -> int:
        """Count the characters at the end of the text that may become a stop string.

        If the text `ended` with one, count its characters and those after it in the last token.
        """
        window = tokens[-self._reach :]
        text = self._raw(window)
        at = self._stop(text) if ended else self._beginning(text)
        inside = len(window)
        while inside and not (
            len(before := self._raw(window[:inside])) <= at and text.startswith(before)
        ):
            inside -= 1
        given = self._visible(window[:inside])
        if inside < len(window) and self._visible(window[inside : inside + 1]):
            given += text[len(self._raw(window[:inside])) : at]
        return len(self._visible(window)) - len(given)

    def _stop(self, text: str) -> int:
        """Return where the first stop string begins; the length if there is none."""
        found = [at for one in self.strings if (at := text.find(one)) >= 0]
        return min(found, default=len(text))

    def _beginning(self, text: str) -> int:
        """Return where the longest end of the text begins that is the start of a stop string; half
        a character at the end may become any character."""
        text = text.rstrip(REPLACEMENT)
        longest = min(len(text), max((len(one) for one in self.strings), default=0) - 1)
        for size in range(longest, 0, -1):
            if any(one.startswith(text[-size:]) for one in self.strings):
                return len(text) - size
        return len(text)

    def _raw(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _visible(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=self.skip)
