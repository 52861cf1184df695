"""Draw the pictures of `examples/` and their captions: `python -m training.shapes.examples OUT`.

The first is placed by hand; the others are seeded scenes with canvases of 256 to 320 pixels.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from training.shapes.scenes import Scene, Thing, caption, draw, is_clear, random_scene

SEED = 7
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


def write_examples(folder: Path) -> None:
    """One PNG for each scene, and captions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = example_scenes()
    for name, scene in scenes.items():
        draw(scene).save(folder / name, optimize=True)
    captions = {name: caption(scene) for name, scene in scenes.items()}
    (folder / "captions.json").write_text(json.dumps(captions, indent=2) + "\n")


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
