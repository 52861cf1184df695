"""The built-in models of Qwen-VL's kinds: right about pictures of many sizes, at every precision.

How right, on hundreds of captions and questions, is held here too: random weights can't show what a
precision costs. The weights as stored are held in tests/training/test_shapes_qwen_trained.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import vlmport
from tests.shapes_qwen import CAPTIONS, EXAMPLES, KNOWN, MODELS, asked, user
from tests.thorough import cells
from vlmport import cli
from vlmport.builtin.questions import conversation, held_out_questions
from vlmport.builtin.scenes import draw
from vlmport.bundle import Bundle
from vlmport.evaluation import evaluate
from vlmport.runtime.model import VLM

PRECISIONS = ("fp32", "q8", "q4")


@pytest.fixture(scope="module", params=MODELS)
def shapes(request: pytest.FixtureRequest, built_in: Callable[[str], Bundle]) -> Bundle:
    return built_in(request.param)


@pytest.mark.parametrize("precision", ["auto", *PRECISIONS])
def test_the_examples_are_captioned_and_answered_right(precision: str, shapes: Bundle) -> None:
    pictures = [EXAMPLES / name for name in CAPTIONS]
    with vlmport.load(shapes.folder, precision=precision) as model:
        assert [one.text for one in model.caption(pictures)] == list(CAPTIONS.values())
        for question in KNOWN:
            answer = model.generate(*asked(question))
            assert answer.text == question["answer"], question
            assert answer.stop_reason == "stop"


def test_a_picture_has_as_many_tokens_as_its_shape_needs(shapes: Bundle) -> None:
    """Pictures of other sizes are seen in other grids, and said the same of."""
    square = Image.open(EXAMPLES / "red_square.png")
    tokens = set()
    with VLM.open(shapes, precision="fp32") as model:
        for width, height in ((256, 256), (128, 128), (400, 256), (256, 360), (640, 420)):
            canvas = Image.new("RGB", (width, height), square.getpixel((0, 0)))
            side = min(width, height)
            place = ((width - side) // 2, (height - side) // 2)
            canvas.paste(square.resize((side, side), Image.Resampling.BICUBIC), place)
            said = model.caption(canvas)
            assert said.text == "a red square on a white background"
            tokens.add(said.counts["image_tokens"])
    assert len(tokens) >= 3


@pytest.mark.parametrize("limit", cells(60, rest=(200,)))
@pytest.mark.parametrize(("questions", "least"), [(False, 95), (True, 90)])
def test_held_out_scenes_are_known_and_rounding_costs_little(
    shapes: Bundle, questions: bool, least: float, limit: int
) -> None:
    """q8 within 1 point of fp32 and q4 within 3; every fourth question is about two pictures."""
    report = evaluate(shapes, questions=questions, limit=limit, precisions=PRECISIONS, record=False)
    assert report.figures["fp32"]["exact_match"] >= least
    assert report.passed, report.losses
    assert {one.precision: one.limit for one in report.losses} == {"q8": 1.0, "q4": 3.0}


def test_a_conversation_costs_its_new_tokens_and_no_answer(shapes: Bundle) -> None:
    """A later question neither encodes nor prefills again, and is answered as afresh."""
    with VLM.open(shapes, precision="fp32") as model:
        for _, scenes in held_out_questions(8):
            pictures = [draw(scene) for scene in scenes]
            chat = model.conversation()
            turns = conversation(scenes, random.Random("turns"), 3)
            for turn, one in enumerate(turns):
                answer = chat.ask(one.question, pictures if turn == 0 else ())
                afresh = model.generate(chat.messages[:-1])
                assert answer.token_ids == afresh.token_ids
                fed = answer.counts["prompt_tokens"] - answer.counts["cached_tokens"]
                assert (fed < 40) == (turn > 0)


# On the command line


def test_ask_and_caption(shapes: Bundle) -> None:
    def run(*arguments: str | Path) -> str:
        command = [*map(str, arguments), "--model", str(shapes.folder)]
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    name, caption = "yellow_circle.png", CAPTIONS["yellow_circle.png"]
    assert run("caption", EXAMPLES / name) == f"{caption}\n"
    assert json.loads(run("caption", "--json", EXAMPLES / name))["caption"] == caption
    red, yellow = EXAMPLES / "red_square.png", EXAMPLES / name
    assert run("ask", red, "what color is the square?") == "red\n"
    asked = "what color is the background in the second image?"
    with VLM.open(shapes) as model:
        answer = model.generate([user(asked, 2)], [red, yellow]).text
    assert run("ask", "--stream", red, yellow, asked) == f"{answer}\n"


@pytest.mark.parametrize("name", MODELS)
def test_they_are_listed_and_taken_by_name(name: str, tmp_path: Path) -> None:
    assert f"{name}\tbuilt in: " in CliRunner().invoke(cli.app, ["models"]).stdout
    command = ["ask", str(EXAMPLES / "red_square.png"), "what color is the square?"]
    done = CliRunner().invoke(
        cli.app, [*command, "--model", name], env={"VLMPORT_CACHE": str(tmp_path)}
    )
    assert done.stdout == "red\n", done.stderr
