"""The scenes keep their promise: one scene has one right caption, and it can be seen."""

import hashlib
import random
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from training.shapes.scenes import (
    BACKGROUNDS,
    GAP,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    draw,
    held_out,
    is_clear,
    pixel_values,
    random_scene,
    relation,
)

SCENES = [random_scene(random.Random(seed)) for seed in range(300)]


def thing(colour: str, cx: float, cy: float, shape: str = "square", size: str = "small") -> Thing:
    return Thing(shape, colour, size, PALETTE[colour], cx, cy, 40.0)


def scene(*things: Thing) -> Scene:
    return Scene(200, 200, "white", BACKGROUNDS["white"], things)


def test_same_seed_same_scene_and_picture() -> None:
    for seed, expected in enumerate(SCENES[:20]):
        again = random_scene(random.Random(seed))
        assert again == expected
        assert draw(again).tobytes() == draw(expected).tobytes()


def digest(scenes: list[Scene]) -> str:
    """SHA-256 of captions, sizes and pixels."""
    whole = hashlib.sha256()
    for each in scenes:
        image = draw(each)
        whole.update(f"{image.mode} {image.size} {caption(each)}\n".encode())
        whole.update(image.tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize(
    ("seed", "count", "expected"),
    [
        (20_000, 1000, "a5c4ff4d598e624e8381c25b631c8725fe0bee4482af2856b843bf17230a865e"),
        (30_000, 400, "eb4c94067ef5d932c10fe7a9e1d1845bb2d8b0523afa5167aff29c4dec748593"),
    ],
)
def test_the_held_out_scenes_are_what_they_were(seed: int, count: int, expected: str) -> None:
    """Every figure of the built-in models is of these pictures (drawn by Pillow 13)."""
    scenes = held_out(count, seed)
    assert digest(scenes) == expected
    assert digest(scenes[:-1]) != expected


def test_enough_variety() -> None:
    assert len(PALETTE) >= 6
    assert len(BACKGROUNDS) >= 4
    assert not PALETTE.keys() & BACKGROUNDS.keys()
    everything = " ".join(caption(scene) for scene in SCENES)
    words = {*PALETTE, *BACKGROUNDS, *SHAPES, "small", "large"}
    for word in {*words, "above", "below", "left of", "right of"}:
        assert word in everything
    assert {len(scene.things) for scene in SCENES} == {1, 2, 3}


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ([thing("red", 100, 100, size="medium")], "a red square on a white background"),
        ([thing("orange", 100, 100, size="medium")], "an orange square on a white background"),
        (
            [thing("blue", 100, 40, "star"), thing("green", 110, 150, "circle", "large")],
            "a large green circle below a small blue star on a white background",
        ),
        (
            [thing("red", 30, 100), thing("yellow", 100, 110), thing("purple", 110, 30)],
            "a small red square left of a small yellow square below a small purple square"
            " on a white background",
        ),
    ],
)
def test_caption(things: list[Thing], expected: str) -> None:
    assert caption(scene(*things)) == expected


def test_caption_ignores_the_order_in_which_things_are_listed() -> None:
    for each in SCENES:
        assert caption(replace(each, things=each.things[::-1])) == caption(each)


def test_relation_is_opposite_from_the_other_side() -> None:
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for each in SCENES:
        for a, b in pairwise(each.things):
            assert relation(each, b, a) == opposite[relation(each, a, b)]


def test_colours_are_distinct_and_sizes_in_their_class() -> None:
    for each in SCENES:
        assert len({t.colour for t in each.things}) == len(each.things)
        for t in each.things:
            low, high = SIZES[t.size]
            assert low <= t.side / min(each.width, each.height) <= high


def test_size_classes_do_not_touch() -> None:
    bounds = sorted(SIZES.values())
    assert all(high + 0.05 < low for (_, high), (low, _) in pairwise(bounds))


def test_objects_lie_inside_and_apart() -> None:
    for each in SCENES:
        gap = GAP * min(each.width, each.height) - 1e-9
        for left, top, right, bottom in (t.box for t in each.things):
            assert left > 0
            assert top > 0
            assert right < each.width
            assert bottom < each.height
        for a, b in combinations([t.box for t in each.things], 2):
            beside = a[2] + gap <= b[0] or b[2] + gap <= a[0]
            assert beside or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def test_relations_survive_a_nudge() -> None:
    """Moving an object by 5 % of the canvas along either axis changes no relation."""
    for each in SCENES:
        for a, b in pairwise(each.things):
            for dx, dy in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)):
                moved = replace(a, cx=a.cx + dx * each.width, cy=a.cy + dy * each.height)
                assert relation(each, moved, b) == relation(each, a, b)


def test_ambiguous_scenes_are_refused() -> None:
    assert is_clear(scene(thing("red", 40, 40), thing("blue", 140, 60)))
    assert not is_clear(scene(thing("red", 40, 40), thing("blue", 140, 140)))  # a diagonal
    assert not is_clear(scene(thing("red", 40, 40), thing("blue", 80, 45)))  # they touch


def test_the_drawing_shows_each_object_and_the_background() -> None:
    for each in SCENES[:100]:
        pixels = np.asarray(draw(each))
        assert pixels.shape == (each.height, each.width, 3)
        assert tuple(pixels[0, 0]) == each.rgb
        for t in each.things:
            assert tuple(pixels[int(t.cy), int(t.cx)]) == t.rgb
            assert np.abs(np.subtract(t.rgb, each.rgb)).max() > 60


def test_canvases_differ_in_size_and_aspect() -> None:
    ratios = [each.width / each.height for each in SCENES]
    assert min(ratios) < 0.8
    assert max(ratios) > 1.25
    assert all(0.74 < ratio < 1.35 for ratio in ratios)
    assert all(min(s.width, s.height) >= 128 and max(s.width, s.height) <= 384 for s in SCENES)


def test_pixel_values_are_in_siglips_range() -> None:
    values = pixel_values(draw(SCENES[0]), 96)
    assert values.shape == (3, 96, 96)
    assert values.dtype == np.float32
    assert -1 <= values.min() < values.max() <= 1
