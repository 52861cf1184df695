"""transformers.js says of pictures what vlmport says, with the built-in models of Qwen-VL's kinds.

Their answers are right, so that equal tokens are no chance.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from tests.shapes_qwen import MODELS, QUESTIONS, asked, kind, user
from tests.transformers_js.test_qwen import CLASSES, answer, ours
from tests.transformers_js.test_transformers_js import MODELS as PARTS
from tests.transformers_js.test_transformers_js import client
from vlmport.bundle import ANY, Bundle

__all__ = ["client"]  # a fixture

ONE = QUESTIONS[0]


@pytest.fixture(scope="module", params=MODELS)
def bundle(request: pytest.FixtureRequest, built_in: Callable[[str], Bundle]) -> Bundle:
    return built_in(request.param)


def said(bundle: Bundle, ids: list[int]) -> str:
    return Tokenizer.from_file(str(bundle.path("tokenizer.json"))).decode(ids)


@pytest.mark.parametrize("dtype", ["fp32", "q8", "q4", "fp16"])
@pytest.mark.usefixtures("client")
def test_precisions(bundle: Bundle, dtype: str) -> None:
    """fp16 has a float16 cache."""
    messages, (picture,) = asked(ONE)
    given = answer(bundle.folder, messages, picture, dtype)
    assert given["class"] == CLASSES[kind(bundle.folder.name)]
    assert given["dtypes"] == dict.fromkeys(PARTS, dtype)
    assert given["ids"] == ours(bundle.folder, messages, picture, dtype)
    assert said(bundle, given["ids"]) == ONE["answer"]


@pytest.mark.usefixtures("client")
def test_a_later_question_without_a_dtype(bundle: Bundle) -> None:
    first, (picture,) = asked(ONE)
    reply = {"role": "assistant", "content": [{"type": "text", "text": ONE["answer"]}]}
    messages = [*first, reply, user("what color is the background?", 0)]
    given = answer(bundle.folder, messages, picture, None)
    auto = bundle.manifest.auto["cpu"]
    assert given["dtypes"] == {name: one for name, one in auto.items() if one != ANY}
    mix = ",".join(f"{name}={one}" for name, one in given["dtypes"].items())
    assert given["ids"] == ours(bundle.folder, messages, picture, mix)
    assert said(bundle, given["ids"]) == "white"
