"""One server for all tests of a file that change nothing in it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.running import Running, running

RED_SQUARE = Path(__file__).parents[2] / "examples/red_square.png"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Serves a model that answers questions, and one that captions."""
    with running({"shapes-smolvlm": "shapes-smolvlm", "shapes": "shapes"}) as one:
        yield one


@pytest.fixture(scope="session")
def red_square() -> str:
    """A data: URL of an image that shows a red square."""
    return "data:image/png;base64," + base64.b64encode(RED_SQUARE.read_bytes()).decode()
