"""What `ask` takes its arguments for, and how answers are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmport.cli.answers import stripped
from vlmport.cli.ask import read_arguments
from vlmport.errors import ImageError, PromptError


def test_pieces_without_the_space_around_them() -> None:
    for text in ("  a b \n c \n", "abc", "   ", "", " x"):
        for size in (1, 2, 3):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            assert "".join(stripped(pieces)) == text.strip()


def test_which_argument_is_what(tmp_path: Path) -> None:
    pictures = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path in pictures:
        Path(path).touch()
    picture = pictures[0]
    assert read_arguments([picture, picture, "Which?"]) == ([picture, picture], "Which?")
    assert read_arguments(["Why?"]) == ([], "Why?")
    assert read_arguments([picture]) == ([picture], None)
    assert read_arguments([picture, "What is photo.jpg"]) == ([picture], "What is photo.jpg")
    assert read_arguments(["x" * 5000]) == ([], "x" * 5000)  # no file has such a name
    assert read_arguments(["a\0b"]) == ([], "a\0b")
    for wrong in (["photo.JPEG"], [picture, "other.webp"], [picture + "x", "Which?"]):
        with pytest.raises(ImageError):
            read_arguments(wrong)
    for wrong in (pictures, [picture, ""]):
        with pytest.raises(PromptError):
            read_arguments(wrong)
