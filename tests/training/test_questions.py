"""Each question has one right answer, which one who sees the scenes finds by another way."""

import random
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise

import pytest

from training.questions import (
    CAPTION_QUESTIONS,
    Exchange,
    conversation,
    growing_conversation,
    held_out_questions,
    questions,
    scene_pair,
    which,
)
from training.shapes.scenes import Scene, Thing, caption, random_scene

NUMBERS = {"one": 1, "two": 2, "three": 3}
ORDINALS = ("first", "second")
SCENES = [random_scene(random.Random(f"{seed}-questions")) for seed in range(300)]


def named(thing: Thing) -> str:
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"


def only(found: list[str]) -> str:
    """What was found, once."""
    assert len(found) == 1, found
    return found[0]


def looked_up(question: str, scenes: list[Scene]) -> str:
    """The answer, read off the scenes word by word; fails where there is not just one."""
    question = question.removesuffix("?")
    if question.startswith("which image has "):
        thing = question.removeprefix("which image has ")
        holders = [n for n, scene in enumerate(scenes) if thing in map(named, scene.things)]
        return f"the {only([ORDINALS[n] for n in holders])}"
    scene = scenes[0]
    for ordinal, one in zip(ORDINALS, scenes, strict=False):
        if question.endswith(f" in the {ordinal} image"):
            question, scene = question.removesuffix(f" in the {ordinal} image"), one
            break
    else:
        assert len(scenes) == 1, f"which picture? {question}"
    things = scene.things
    words = question.split()
    if question == "how many shapes are there":
        return only([word for word, count in NUMBERS.items() if count == len(things)])
    if question == "what color is the background":
        return scene.background
    if question.startswith("is there "):
        return "yes" if question.removeprefix("is there ") in map(named, things) else "no"
    if question.startswith("what color is the "):
        return only([thing.colour for thing in things if thing.shape == words[-1]])
    if question.startswith("what shape is the "):
        return only([thing.shape for thing in things if thing.colour == words[-2]])
    found = [thing for thing in things if words[-2:] == [thing.colour, thing.shape]]
    assert len(found) == 1, found
    subject = found[0]
    side = question.removeprefix("what is ").split(" the ")[0]
    others = [thing for thing in things if thing is not subject]
    return only([named(other) for other in others if lies(scene, other, subject) == side])


def lies(scene: Scene, other: Thing, thing: Thing) -> str:
    """The side that leads by pixels; the scene's shape must not change it."""
    dx, dy = other.cx - thing.cx, other.cy - thing.cy
    by_pixels, by_shares = abs(dx) > abs(dy), abs(dx / scene.width) > abs(dy / scene.height)
    assert by_pixels == by_shares
    if by_pixels:
        return "right of" if dx > 0 else "left of"
    return "below" if dy > 0 else "above"


def asked() -> Iterator[tuple[list[Scene], list[Exchange]]]:
    rng = random.Random("asked")
    for scene in SCENES:
        yield [scene], questions(scene, rng)
    for _ in range(300):
        pair = scene_pair(rng)
        both = [
            one
            for ordinal, scene in zip(ORDINALS, pair, strict=True)
            for one in questions(scene, rng, f" in the {ordinal} image")
        ]
        yield pair, [*which(pair, rng), *both]


def test_each_question_has_the_answer_that_is_seen() -> None:
    count = 0
    for scenes, exchanges in asked():
        assert len({one.question for one in exchanges}) == len(exchanges)
        for one in exchanges:
            assert looked_up(one.question, scenes) == one.answer, one
            count += 1
    assert count > 3000


def test_the_look_up_tells_scenes_apart() -> None:
    """The test above is none if every scene gives the same answers."""
    rng = random.Random("apart")
    different = 0
    for one, other in pairwise(SCENES):
        for exchange in questions(one, rng):
            try:
                different += looked_up(exchange.question, [other]) != exchange.answer
            except AssertionError:  # it can't be asked about that one
                different += 1
    assert different > 1000


def test_no_kind_is_missing_and_no_answer_is_the_better_guess() -> None:
    kinds: Counter[str] = Counter()
    sides: Counter[str] = Counter()
    for _, exchanges in asked():
        kinds.update(one.kind for one in exchanges)
        sides.update(one.question.split()[2] for one in exchanges if one.kind == "beside")
    assert set(kinds) == {
        "background", "beside", "color", "count", "exists, no", "exists, yes", "shape", "which",
    }  # fmt: skip
    assert kinds["exists, no"] == kinds["exists, yes"]
    assert set(sides) == {"left", "right", "above", "below"}
    assert max(sides.values()) < 2 * min(sides.values())


@pytest.mark.parametrize("pictures", [1, 2])
def test_conversations(pictures: int) -> None:
    rng = random.Random(f"{pictures}-conversations")
    for _ in range(300):
        scenes = scene_pair(rng) if pictures == 2 else [random_scene(rng)]
        exchanges = conversation(scenes, rng, 6)
        assert 1 <= len(exchanges) <= 6
        assert len({one.question for one in exchanges}) == len(exchanges)
        assert exchanges[0].images == tuple(range(pictures))
        assert all(one.images == () for one in exchanges[1:])
        for one in exchanges:
            if one.kind == "caption":
                assert pictures == 1
                assert one.question in CAPTION_QUESTIONS
                assert one.answer == caption(scenes[0])
            else:
                assert looked_up(one.question, scenes) == one.answer


def test_a_second_picture_comes_with_the_first_question_about_it() -> None:
    rng = random.Random("growing")
    for _ in range(300):
        scenes = scene_pair(rng)
        exchanges = growing_conversation(scenes, rng, 6)
        shown: list[Scene] = []
        for one in exchanges:
            shown += [scenes[index] for index in one.images]
            if one.kind == "caption":  # "this image": the one that is given with it
                assert one.answer == caption(scenes[one.images[0]] if one.images else scenes[0])
                assert one.images == (1,) or len(shown) == 1
            else:
                assert looked_up(one.question, shown) == one.answer
        assert shown == scenes


def test_kinds_come_as_often_as_they_weigh() -> None:
    rng = random.Random("weights")
    scenes = [random_scene(rng, 3) for _ in range(300)]
    first = Counter(conversation([one], rng, 1, {"color": 9.0})[0].kind for one in scenes)
    assert first["color"] > 100
    none = Counter(conversation([one], rng, 3, {"caption": 0.0})[0].kind for one in scenes)
    assert "caption" not in none


def test_the_held_out_questions_are_what_they_were() -> None:
    """Every figure of the built-in models is of these."""
    asked = held_out_questions(1000)
    assert [len(scenes) for _, scenes in asked[:8]] == [1, 1, 1, 2, 1, 1, 1, 2]
    assert held_out_questions(10) == asked[:10]
    for one, scenes in asked:
        assert one.images == tuple(range(len(scenes)))
        assert looked_up(one.question, scenes) == one.answer
    kinds = Counter(one.kind for one, _ in asked)
    assert min(kinds.values()) > 50
    text = "\n".join(f"{one.question} {one.answer}" for one, _ in asked)
    assert sha256(text.encode()).hexdigest() == (
        "68c6fcf4d2c5c01f1cabaedc5755c251d8b2ace2159a1c8f99dd02c8f31947e7"
    )
