"""Make an answer match a JSON schema, a regular expression or a grammar, with llguidance.

At each step the grammar says which tokens may come next; all others are masked before a token is
chosen. Stop tokens are allowed where the text may end, and nothing else where it must end.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from vlmport.errors import LONGEST, DependencyError, OptionError, cut, quoted
from vlmport.runtime.decoding.options import GRAMMARS, GenerationOptions

if TYPE_CHECKING:
    import llguidance
    from jaxtyping import Bool

# As json.dumps writes, so that no model can fill a text with spaces between two fields.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarTokenizer:
    """A model's tokenizer for llguidance; made once, because large ones take seconds."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Sequence[int]):
        """Raises DependencyError without llguidance, OptionError for a tokenizer it can't read."""
        library = _library()
        size = max(vocab_size, max(tokenizer.get_vocab().values(), default=0) + 1)
        stops = [token for token in stop_token_ids if token < vocab_size]
        if not stops:
            raise OptionError(
                "this model has no stop token, and a text under a grammar needs one to end",
                hint="leave json_schema and regex out",
                code="option.not-for-this-model",
            )
        try:
            plain = Tokenizer.from_str(tokenizer.to_str())
            plain.no_padding()
            plain.no_truncation()
            self.native = library.LLTokenizer(plain.to_str(), n_vocab=size, eos_token=stops)
        except Exception as error:  # the libraries raise ValueError, or a plain Exception
            raise OptionError(
                f"llguidance can't read this model's tokenizer: {cut(str(error))}",
                hint="leave json_schema and regex out: they do not work with this model",
                code="option.not-for-this-model",
            ) from error
        self.vocab_size = vocab_size


class Grammar:
    """A grammar, and the state of one request's rows in it."""

    def __init__(self, tokenizer: GrammarTokenizer, source: str, said: str):
        """Args:
            source: the grammar in llguidance's own format.
            said: the option as the caller wrote it, for errors.

        Raises OptionError where it is invalid, or no text matches it.
        """
        library = _library()
        limits = library.LLParserLimits(verbose_errors=False)
        self._said, self._vocab_size = said, tokenizer.vocab_size
        with _errors_of(said):
            first = library.LLMatcher(tokenizer.native, source, log_level=0, limits=limits)
        if first.is_error():
            raise OptionError(
                f"{said}: {_reason(first)}",
                hint="check it; the documentation of llguidance describes what it can read",
                code="grammar.invalid",
            )
        self._matchers: dict[tuple[int, ...], llguidance.LLMatcher | None] = {(): first}
        first.compute_bitmask()
        if first.is_error():
            raise OptionError(
                f"{said}: no text matches it",
                hint="check whether parts of it contradict each other",
                code="grammar.invalid",
            )

    def fresh(self) -> Grammar:
        """Return the same grammar for another request, without compiling it again."""
        other = copy.copy(self)
        other._matchers = {(): self._matchers[()]}
        return other

    def mask(self, tokens: Sequence[int]) -> Bool[np.ndarray, " V"]:
        """Return which tokens may follow these.

        No token may follow tokens that break the grammar, which beam search keeps when there is
        nothing better, or tokens after which no token of the model fits.

        Raises OptionError where the grammar is too complex.
        """
        matcher = self._matcher(tuple(tokens))
        if matcher is None:
            return np.zeros(self._vocab_size, np.bool_)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            if "NoExtension" in matcher.get_error():
                return np.zeros(self._vocab_size, np.bool_)
            raise OptionError(
                f"{self._said}: {_reason(matcher)}",
                hint="use a simpler one",
                code="grammar.too-complex",
            )
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).view(np.bool_)

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether a text may end after these tokens."""
        matcher = self._matcher(tuple(tokens))
        return matcher is not None and matcher.is_accepting()

    def _matcher(self, tokens: tuple[int, ...]) -> llguidance.LLMatcher | None:
        """Return the matcher after these tokens, a copy of the last one with the new token."""
        known = self._matchers
        if tokens in known:
            return known[tokens]
        parent = tokens[:-1] if tokens[:-1] in known else ()
        before = known[parent]
        matcher = None if before is None else before.deep_copy()
        if matcher is not None and not matcher.consume_tokens(list(tokens[len(parent) :])):
            matcher = None
        known[tokens] = matcher
        for one in [one for one in known if 0 < len(one) < len(tokens) - 1]:
            del known[one]
        return matcher


class Grammars:
    """The grammars of one model's tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Sequence[int]):
        self._made_of = tokenizer, vocab_size, stop_token_ids
        self._tokenizer: GrammarTokenizer | None = None
        self._making = threading.Lock()  # made once: large ones take seconds

    def of(self, options: GenerationOptions) -> Grammar | None:
        """Make the grammar of json_schema, regex or lark_grammar; None without.

        Raises OptionError or DependencyError.
        """
        if all(getattr(options, name) is None for name in GRAMMARS):
            return None
        library = _library()
        if options.json_schema is not None:
            said = f"json_schema={cut(options.json_schema, 80)}"
            with _errors_of(said):
                source = library.LLMatcher.grammar_from_json_schema(
                    options.json_schema, overrides=JSON_LAYOUT
                )
        elif options.lark_grammar is not None:
            said = f"lark_grammar={quoted(options.lark_grammar, 80)}"
            source = library.LLMatcher.grammar_from_lark(options.lark_grammar)
        else:
            said = f"regex={quoted(options.regex, 80)}"
            source = library.LLMatcher.grammar_from_regex(options.regex)
        with self._making:
            self._tokenizer = self._tokenizer or GrammarTokenizer(*self._made_of)
        return Grammar(self._tokenizer, source, said)


def _library() -> Any:
    """Import llguidance. Raises DependencyError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise DependencyError(
            "json_schema and regex need llguidance",
            hint="pip install 'vlmport[grammar]'",
            code="dependency.missing",
        ) from error
    return llguidance


@contextlib.contextmanager
def _errors_of(said: str) -> Iterator[None]:
    """Raise OptionError where llguidance raises: it does for JSON that is nested too deeply."""
    try:
        yield
    except ValueError as error:
        raise OptionError(
            f"{said}: {cut(str(error))}",
            hint="nest it less deeply",
            code="grammar.invalid",
        ) from error


def _reason(matcher: Any) -> str:
    """Return llguidance's message in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("<", "^")))[:LONGEST]
