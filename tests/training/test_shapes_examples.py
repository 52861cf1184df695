"""The pictures in examples/ are those that the recipe draws."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.shapes.examples import example_questions, example_scenes
from training.shapes.scenes import caption, draw, is_clear

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_captions_are_those_of_the_scenes() -> None:
    captions = json.loads((EXAMPLES / "captions.json").read_text())
    assert captions == {name: caption(scene) for name, scene in example_scenes().items()}
    assert captions["red_square.png"] == "a red square on a white background"


def test_questions_are_those_of_the_scenes() -> None:
    asked = json.loads((EXAMPLES / "questions.json").read_text())
    assert asked == example_questions(example_scenes())
    first = {"images": ["red_square.png"], "question": "what color is the square?", "answer": "red"}
    assert asked[0] == first
    assert [len(one["images"]) for one in asked[-2:]] == [2, 2]


def test_pictures_are_drawn_from_the_scenes() -> None:
    scenes = example_scenes()
    assert {len(scene.things) for scene in scenes.values()} == {1, 2, 3}
    for name, scene in scenes.items():
        assert is_clear(scene)
        with Image.open(EXAMPLES / name) as image:
            assert np.array_equal(np.asarray(image), np.asarray(draw(scene)))
