"""Conversations in Chromium, of every talking family: the same tokens as Python's, turn by turn.

Apart from test_web.py, so that two workers share the tests of the browser.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.shapes_qwen import MODELS
from tests.web import talks
from tests.web.conftest import Environment, run_in_chromium
from tests.web.expected import EXAMPLES
from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle
from vlmport.export import export

FILE = "turns.test.ts"

# Built-in models that answer.
TRAINED = ("shapes-smolvlm", *MODELS)

# Options of the image processor that a test of each random model sets.
RANDOM: dict[str, dict[str, Any]] = {
    "tiles": {"do_image_splitting": False},
    "windows": {"max_pixels": 3136},
    "lanes": {"max_pixels": 4096},
}


@pytest.fixture(scope="module")
def talkers(tiles: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Models that answer questions, random and trained; the Qwen ones have a graph of positions."""
    folder = tmp_path_factory.mktemp("talkers")
    found = {"tiles": tiles}
    for name, write in (("windows", write_qwen2_5), ("lanes", write_qwen3)):
        source = write(folder / f"{name}-source")
        found[name] = export(source, folder / name, precisions="fp32,q8")
    for name in TRAINED:
        found[name] = export(builtin_models()[name], folder / name, precisions="fp32,q8,q4")
    return found


def test_in_chromium(
    node: str, environment_of: Environment, talkers: dict[str, Bundle], kinds: list[Path]
) -> None:
    said = {
        name: talks.trained_talks(talker, EXAMPLES)
        if name in TRAINED
        else talks.talks(talker, kinds[0].parent, RANDOM[name])
        for name, talker in talkers.items()
    }
    run_in_chromium(node, FILE, environment_of(talkers, {"talks": said}))
