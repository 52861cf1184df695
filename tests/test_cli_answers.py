"""How answers are printed."""

from __future__ import annotations

from vlmport.cli.answers import stripped


def test_pieces_without_the_space_around_them() -> None:
    for text in ("  a b \n c \n", "abc", "   ", "", " x"):
        for size in (1, 2, 3):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            assert "".join(stripped(pieces)) == text.strip()
