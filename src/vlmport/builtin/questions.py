"""Questions about the scenes of `vlmport.builtin.scenes`, each with one right answer.

The built-in models that answer are trained on them, and `vlmport eval --questions` measures on
questions that training never sees. As with captions, there is no question that a viewer could
answer in two ways. In a conversation about two images, a question about one of them names it ("in
the second image").
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlmport.builtin.scenes import (
    HELD_OUT_SEED,
    PALETTE,
    SHAPES,
    Scene,
    Thing,
    caption,
    clear_relation,
    random_scene,
    relation,
)

ORDINALS = ("first", "second")
NUMBERS = ("zero", "one", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")
CAPTION_QUESTIONS = (
    "Can you describe this image?",
    "Describe this image.",
    "What is in this image?",
)


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, and the images (indices into the scenes) that come with it."""

    kind: str
    question: str
    answer: str
    images: tuple[int, ...] = ()


def describe(scene: Scene, rng: random.Random) -> Exchange:
    """Ask for the caption of an image, in one of three ways."""
    return Exchange("caption", rng.choice(CAPTION_QUESTIONS), caption(scene))


def questions(scene: Scene, rng: random.Random, where: str = "") -> list[Exchange]:
    """List every question that has one answer, of each kind; `where` names the image.

    There is one question with the answer yes and one with no, so that neither is the better guess.
    """
    asked = [
        Exchange("count", f"how many shapes are there{where}?", NUMBERS[len(scene.things)]),
        Exchange("background", f"what color is the background{where}?", scene.background),
        _exists(scene.things[rng.randrange(len(scene.things))], "yes", where),
        _exists(_absent(scene, rng), "no", where),
    ]
    for thing in scene.things:
        if [other.shape for other in scene.things].count(thing.shape) == 1:
            question = f"what color is the {thing.shape}{where}?"
            asked.append(Exchange("color", question, thing.colour))
        question = f"what shape is the {thing.colour} one{where}?"
        asked.append(Exchange("shape", question, thing.shape))
        asked += [_beside(scene, thing, side, where) for side in _sides(scene, thing)]
    return asked


def which(scenes: Sequence[Scene], rng: random.Random) -> list[Exchange]:
    """Ask "which image has …?" for things that are in only one of two images."""
    asked = []
    for index, scene in enumerate(scenes):
        others = {
            (thing.colour, thing.shape)
            for number, other in enumerate(scenes)
            for thing in other.things
            if number != index
        }
        for thing in scene.things:
            if (thing.colour, thing.shape) not in others:
                question = f"which image has {_a(thing.colour, thing.shape)}?"
                asked.append(Exchange("which", question, f"the {ORDINALS[index]}"))
    rng.shuffle(asked)
    return asked


def held_out_questions(count: int, seed: int = HELD_OUT_SEED) -> list[tuple[Exchange, list[Scene]]]:
    """Draw single questions with their scenes, from a seed that training never uses.

    Every fourth is about two images, and needs both. Kinds are drawn evenly, except for `which`,
    which only pairs have. The first ones are the same for any count.
    """
    rng = random.Random(f"{seed}-held-out-questions")
    return [_held_out(rng, pictures=2 if number % 4 == 3 else 1) for number in range(count)]


def conversation(
    scenes: Sequence[Scene],
    rng: random.Random,
    turns: int,
    weights: Mapping[str, float] | None = None,
) -> list[Exchange]:
    """Draw up to `turns` exchanges about one or two images, which all come with the first exchange.

    No question is repeated.

    Args:
        weights: kind → its weight; None draws all kinds evenly, so that rare ones are learnt too.
    """
    asked = [describe(scenes[0], rng)] if len(scenes) == 1 else []
    chosen = draw([*asked, *all_about(scenes, rng)], rng, turns, weights)
    return [_showing(chosen[0], *range(len(scenes))), *chosen[1:]]


def _held_out(rng: random.Random, pictures: int) -> tuple[Exchange, list[Scene]]:
    scenes = [random_scene(rng)] if pictures == 1 else scene_pair(rng)
    (asked,) = draw(all_about(scenes, rng), rng, 1, {"which": 3.0})
    return _showing(asked, *range(len(scenes))), scenes


def all_about(scenes: Sequence[Scene], rng: random.Random) -> list[Exchange]:
    """List every question about one image, or about two."""
    if len(scenes) == 1:
        return questions(scenes[0], rng)
    asked = which(scenes, rng)
    for ordinal, scene in zip(ORDINALS, scenes, strict=True):
        asked += questions(scene, rng, f" in the {ordinal} image")
    return asked


def draw(
    asked: list[Exchange],
    rng: random.Random,
    turns: int,
    weights: Mapping[str, float] | None = None,
) -> list[Exchange]:
    """Draw up to `turns` of the questions, first a kind by `weights` and then one of that kind."""
    left: dict[str, list[Exchange]] = {}
    for exchange in asked:
        left.setdefault(exchange.kind, []).append(exchange)
    chosen: list[Exchange] = []
    while left and len(chosen) < turns:
        kinds = sorted(left)
        if weights is None:
            kind = rng.choice(kinds)
        else:
            (kind,) = rng.choices(kinds, [weights.get(one, 1.0) for one in kinds])
        chosen.append(left[kind].pop(rng.randrange(len(left[kind]))))
        if not left[kind]:
            del left[kind]
    return chosen


def _showing(exchange: Exchange, *images: int) -> Exchange:
    return replace(exchange, images=images)


def _exists(thing: Thing | tuple[str, str], answer: str, where: str) -> Exchange:
    colour, shape = thing if isinstance(thing, tuple) else (thing.colour, thing.shape)
    return Exchange(f"exists, {answer}", f"is there {_a(colour, shape)}{where}?", answer)


def _absent(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Draw a colour and a shape that no thing has together; half have a colour of the scene."""
    present = {(thing.colour, thing.shape) for thing in scene.things}
    colours = [thing.colour for thing in scene.things] if rng.random() < 0.5 else list(PALETTE)
    while True:
        pair = rng.choice(colours), rng.choice(SHAPES)
        if pair not in present:
            return pair


def _sides(scene: Scene, thing: Thing) -> list[str]:
    """List the sides of a thing on which there is exactly one other, if all relations are clear."""
    others = [other for other in scene.things if other is not thing]
    if not all(clear_relation(scene, thing, other) for other in others):
        return []
    lying = [relation(scene, other, thing) for other in others]
    return [side for side in RELATIONS if lying.count(side) == 1]


def _beside(scene: Scene, thing: Thing, side: str, where: str) -> Exchange:
    (other,) = [
        other
        for other in scene.things
        if other is not thing and relation(scene, other, thing) == side
    ]
    question = f"what is {side} the {thing.colour} {thing.shape}{where}?"
    return Exchange("beside", question, _a(other.colour, other.shape))


def _a(colour: str, shape: str) -> str:
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def scene_pair(rng: random.Random) -> list[Scene]:
    """Draw two scenes of one or two things each."""
    return [random_scene(rng, rng.randint(1, 2)) for _ in range(2)]
