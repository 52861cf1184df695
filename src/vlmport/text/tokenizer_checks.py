"""Decide which tokenizers are refused, and which may run in this process.

A tokenizer.json comes with a model from an unknown source, and its parts are small programs:
normalizers that make text longer, regular expressions that take forever, sizes of zero. Parts
that can crash the process are refused. Unusual parts run in a process that can be killed
(`vlmport.text.killable`). The rest, nearly every published tokenizer, runs in this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_BYTES = 256 << 20  # maximum size of the file; the largest published ones have 35 MB
MAX_PARTS = 64
MAX_DEPTH = 8
MAX_GROWTH = 64  # maximum characters that a part makes of one character
USUAL_GROWTH = 4
MAX_PATTERN = 2000  # characters
MAX_STRIP = 64
NESTED = ("normalizers", "pretokenizers", "decoders")

# Regular expressions of published tokenizers; each takes time in proportion to the text.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = frozenset(
    {
        _WORDS + r"|\p{N}" + _REST,  # Qwen
        _WORDS + r"|\p{N}{1,3}" + _REST,  # Llama 3
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        r"\n\n",
        r"\n",
        r"\s",
        r"\s+",
        r" {2,}",
        r"\p{N}",
        r"[0-9]",
        r"\d",
    }
)
USUAL = frozenset(
    {
        "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "BertNormalizer",
        "Prepend", "Replace", "ByteLevel", "Sequence", "Whitespace", "WhitespaceSplit",
        "BertPreTokenizer", "Punctuation", "Digits", "Metaspace", "Split", "CharDelimiterSplit",
        "UnicodeScripts", "FixedLength", "WordPiece", "Fuse", "ByteFallback", "BPEDecoder", "CTC",
    }
)  # fmt: skip
# Maximum characters that these parts make of one character.
GROWTH = {"NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "ByteLevel": 4, "BertNormalizer": 3}

PARTS = ("normalizer", "pre_tokenizer", "decoder")


def problems_of(parts: Mapping[str, Any]) -> list[str]:
    """List the problems of normalizer, pre_tokenizer and decoder, given as in tokenizer.json."""
    found: list[str] = []
    for name in PARTS:
        if (depth := _depth(parts.get(name))) > MAX_DEPTH:
            found.append(f"{name}: nested more than {MAX_DEPTH} times")
            continue
        steps = list(_steps(parts.get(name)))
        if len(steps) > MAX_PARTS:
            found.append(f"{name}: {len(steps)} parts, at most {MAX_PARTS}")
        if depth and (grown := growth(parts.get(name))) > MAX_GROWTH:
            found.append(
                f"{name}: makes {grown:.0f} characters of one, the maximum is {MAX_GROWTH}"
            )
        for step in steps:
            found += [f"{name}: {one}" for one in _problems(step, name)]
    return found


def _problems(step: Mapping[str, Any], where: str) -> Iterator[str]:
    kind, pattern = step.get("type"), _pattern(step)
    if kind == "FixedLength" and step.get("length", 5) == 0:
        yield "FixedLength of 0"
    if kind == "Strip" and where == "decoder":
        sizes = [step.get("start", 0), step.get("stop", 0)]
        if any(isinstance(one, int) and one > MAX_STRIP for one in sizes):
            yield f"Strip of {max(sizes)} characters, at most {MAX_STRIP}"
        if sizes[1]:  # the library panics if a token has fewer
            yield f"Strip of {str(sizes[1])[:20]} characters from the end, expected 0"
    if pattern is not None and len(pattern) > MAX_PATTERN:
        yield f"a pattern of {len(pattern)} characters, at most {MAX_PATTERN}"
    if pattern is not None and where == "decoder" and pattern not in KNOWN_PATTERNS:
        yield f"the pattern {pattern[:40]!r}, which is not a known one"


def is_usual(parts: Mapping[str, Any]) -> bool:
    """Whether the time and memory of these parts are in proportion to the text."""
    steps = [step for name in PARTS for step in _steps(parts.get(name))]
    patterns = [_pattern(step) for step in steps]
    return (
        all(step.get("type") in USUAL for step in steps)
        and all(one is None or one in KNOWN_PATTERNS for one in patterns)
        and all(growth(parts.get(name), usual=True) <= USUAL_GROWTH for name in PARTS)
    )


def growth(part: Any, *, usual: bool = False) -> float:
    """Return the maximum number of characters that a part makes of one.

    Args:
        usual: leave out growth that Unicode itself limits.
    """
    if not isinstance(part, Mapping):
        return 1.0
    grown = 1.0
    for step in _steps(part):
        kind = step.get("type")
        if kind == "Replace":
            text, pattern = str(step.get("content", "")), step.get("pattern")
            old = str(pattern.get("String", "")) if isinstance(pattern, Mapping) else ""
            grown *= max(1.0, len(text) / len(old)) if old else 1.0 + len(text)
        elif kind == "Prepend":  # once per text, at its start
            grown *= 1.0 + len(str(step.get("prepend", ""))) / 16
        elif not usual:
            grown *= GROWTH.get(str(kind), 1)
    return grown


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the innermost parts of a part, in order."""
    if not isinstance(part, Mapping):
        return
    inner = next((part[name] for name in NESTED if isinstance(part.get(name), list)), None)
    if inner is None:
        yield part
        return
    for one in inner:
        yield from _steps(one)


def _depth(part: Any) -> int:
    if not isinstance(part, Mapping):
        return 0
    inner = next((part[name] for name in NESTED if isinstance(part.get(name), list)), [])
    return 1 + max((_depth(one) for one in inner), default=0)


def _pattern(step: Mapping[str, Any]) -> str | None:
    """Return the regular expression of a step; None for a plain text."""
    pattern = step.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return found if isinstance(found, str) else None
