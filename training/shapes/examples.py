"""Draw the pictures of `examples/`, with captions, questions and answers.

    python -m training.shapes.examples OUT

The first is placed by hand; the others are seeded scenes with canvases of 256 to 320 pixels.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.questions import Exchange, questions, which
from training.shapes.scenes import Scene, Thing, caption, draw, is_clear, random_scene

SEED = 7
# Of each picture in order: the first is asked "what color is the square?".
QUESTION_KINDS = (
    "color",
    "background",
    "beside",
    "exists, no",
    "shape",
    "count",
    "beside",
    "exists, yes",
)
COUNTS = (1, 2, 2, 2, 3, 3, 3)
LEAST, MOST = 256, 320

RED_SQUARE = Scene(
    width=256,
    height=256,
    background="white",
    rgb=(255, 255, 255),
    things=(Thing("square", "red", "medium", (230, 30, 35), 128.0, 128.0, 82.0),),
)


def example_scenes() -> dict[str, Scene]:
    """File name to scene, in order."""
    rng = random.Random(f"{SEED}-examples")
    scenes = {"red_square.png": RED_SQUARE}
    while len(scenes) <= len(COUNTS):
        scene = _on_larger_canvas(random_scene(rng, COUNTS[len(scenes) - 1]))
        if max(scene.width, scene.height) <= MOST and is_clear(scene):
            scenes[_file_name(scene, scenes)] = scene
    return scenes


def example_questions(scenes: dict[str, Scene]) -> list[dict[str, Any]]:
    """A question about each picture, a kind at a time; then which of two pictures has something."""
    rng = random.Random(f"{SEED}-example-questions")
    asked = []
    for kind, (name, scene) in zip(QUESTION_KINDS, scenes.items(), strict=True):
        found = [one for one in questions(scene, rng) if one.kind == kind]
        asked.append(_entry([name], rng.choice(found)))
    names = list(scenes)
    for answer, pair in (("the second", names[:2]), ("the first", names[3:5])):
        found = [one for one in which([scenes[n] for n in pair], rng) if one.answer == answer]
        asked.append(_entry(pair, found[0]))
    return asked


def _entry(names: list[str], asked: Exchange) -> dict[str, Any]:
    return {"images": names, "question": asked.question, "answer": asked.answer}


def write_examples(folder: Path) -> None:
    """One PNG for each scene, captions.json and questions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = example_scenes()
    for name, scene in scenes.items():
        draw(scene).save(folder / name, optimize=True)
    captions = {name: caption(scene) for name, scene in scenes.items()}
    asked = example_questions(scenes)
    for file, content in (("captions.json", captions), ("questions.json", asked)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def _on_larger_canvas(scene: Scene) -> Scene:
    """The same scene with its shorter side at least `LEAST` pixels."""
    short = min(scene.width, scene.height)
    scale = max(LEAST, short) / short
    things = tuple(
        replace(t, cx=t.cx * scale, cy=t.cy * scale, side=t.side * scale) for t in scene.things
    )
    width, height = round(scene.width * scale), round(scene.height * scale)
    return replace(scene, width=width, height=height, things=things)


def _file_name(scene: Scene, taken: dict[str, Scene]) -> str:
    """`red_star_blue_circle.png`: what is in the picture, in order of mention."""
    name = "_".join(f"{thing.colour}_{thing.shape}" for thing in scene.things) + ".png"
    assert name not in taken, name
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    write_examples(parser.parse_args().out)


if __name__ == "__main__":
    main()
