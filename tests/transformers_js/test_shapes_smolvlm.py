"""transformers.js says of pictures what vlmport says, with the built-in model that answers.

Its answers are right, so that equal tokens are no chance. Each precision's decoder runs with the
cache of its own type: float16 at fp16 and q4f16.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.transformers_js.test_conversations import IMAGE, answer, ours, user
from tests.transformers_js.test_transformers_js import HERE, MODELS, ROOT, client
from vlmport.bundle import ANY, Bundle

__all__ = ["client"]  # a fixture

EXAMPLES = ROOT / "examples"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text("utf-8"))
ONE, TWO = QUESTIONS[0], QUESTIONS[-1]
PRECISIONS = ("fp32", "q8", "q4", "fp16", "q4f16")


@pytest.fixture(scope="module")
def bundle(built_in: Callable[[str], Bundle]) -> Bundle:
    return built_in("shapes-smolvlm")


def asked(question: dict[str, Any]) -> tuple[list[Any], list[Path]]:
    """Messages and pictures."""
    parts = [IMAGE for _ in question["images"]]
    return [user(*parts, question["question"])], [EXAMPLES / name for name in question["images"]]


def said(bundle: Bundle, ids: list[int]) -> str:
    return Tokenizer.from_file(str(bundle.path("tokenizer.json"))).decode(ids).strip()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.usefixtures("client")
def test_precisions(bundle: Bundle, dtype: str) -> None:
    """q8 scales activations by all tiles of a run, which the client has in one and we one by one:
    it is asked about one tile."""
    split = dtype != "q8"
    messages, shown = asked(ONE)
    given = answer(bundle.folder, messages, shown, split, dtype)
    assert given["class"] == "Idefics3ForConditionalGeneration"
    assert given["dtypes"] == dict.fromkeys(MODELS, dtype)
    assert given["ids"] == ours(bundle.folder, messages, shown, split, dtype)
    assert said(bundle, given["ids"]) == ONE["answer"]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.usefixtures("client")
def test_two_pictures(bundle: Bundle, split: bool) -> None:
    messages, shown = asked(TWO)
    given = answer(bundle.folder, messages, shown, split, "fp32")
    assert given["ids"] == ours(bundle.folder, messages, shown, split, "fp32")
    assert said(bundle, given["ids"]) in ("the first", "the second")


@pytest.mark.usefixtures("client")
def test_a_later_question(bundle: Bundle) -> None:
    first, shown = asked(ONE)
    reply = {"role": "assistant", "content": [{"type": "text", "text": ONE["answer"]}]}
    messages = [*first, reply, user("what color is the background?")]
    given = answer(bundle.folder, messages, shown, True, "fp32")
    assert given["ids"] == ours(bundle.folder, messages, shown, True, "fp32")
    assert said(bundle, given["ids"]) == "white"


@pytest.mark.usefixtures("client")
def test_without_a_dtype(bundle: Bundle) -> None:
    messages, shown = asked(ONE)
    given = answer(bundle.folder, messages, shown, False, None)
    auto = bundle.manifest.auto["cpu"]
    assert given["dtypes"] == {name: one for name, one in auto.items() if one != ANY}
    mix = ",".join(f"{name}={one}" for name, one in given["dtypes"].items())
    assert given["ids"] == ours(bundle.folder, messages, shown, False, mix)
    assert said(bundle, given["ids"]) == ONE["answer"]


@pytest.mark.usefixtures("client")
def test_the_example_script(bundle: Bundle, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node is not None
    script = shutil.copy(EXAMPLES / "transformers_js.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    picture = EXAMPLES / ONE["images"][0]
    command = [node, script, str(bundle.folder), str(picture), ONE["question"], "q8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ONE["answer"]
