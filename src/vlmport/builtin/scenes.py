"""Choose, caption and draw scenes of one to three shapes.

The built-in models are trained on them (`training/` of the repository), and `vlmport eval`
measures on scenes that training never sees.

A caption is a function of its scene, and a scene that a viewer could caption in two ways is
never chosen:

* Objects are named in the order of `PALETTE`; colours in one scene are distinct.
* An object is `a(n) [size] colour shape`; the middle size has no word.
* Each object but the last is placed relative to the *next named* one: along the axis on which
  their centres differ most. `clear_relation` keeps the two axes well apart, both as drawn and
  as squashed to the model's square.
* The caption ends with `on a <background> background`.

Needs Pillow only. One seed gives the same scenes and pixels everywhere; a test holds their hashes.
"""

import random
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import cos, pi, sin

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "red": (230, 30, 35),
    "orange": (245, 140, 25),
    "yellow": (250, 225, 45),
    "green": (40, 165, 70),
    "blue": (40, 85, 220),
    "purple": (130, 25, 185),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "pink": (255, 190, 205),
}
SHAPES = ("circle", "square", "triangle", "star")
# Side of the bounding box as a fraction of the canvas's shorter side. The gaps between the
# classes are wider than the classes, so no object is between two sizes.
SIZES: dict[str, tuple[float, float]] = {
    "small": (0.19, 0.23),
    "medium": (0.29, 0.34),
    "large": (0.42, 0.48),
}
COLOUR_JITTER = 24  # per channel, so that a pure red or a dull one is still red
BACKGROUND_JITTER = 8
EDGE = 0.02  # least distance of a box to the canvas's edge, in shorter sides
GAP = 0.03  # least distance between two boxes, in shorter sides
AXIS_MARGIN = 0.15  # least lead of the naming axis over the other one
SUPERSAMPLE = 4
HELD_OUT_SEED = 20_000


@dataclass(frozen=True)
class Thing:
    """One object. Centre and side in pixels of the canvas; `rgb` is the jittered colour."""

    shape: str
    colour: str
    size: str
    rgb: RGB
    cx: float
    cy: float
    side: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        half = self.side / 2
        return self.cx - half, self.cy - half, self.cx + half, self.cy + half


@dataclass(frozen=True)
class Scene:
    """A canvas in pixels, its background and its things in order of mention."""

    width: int
    height: int
    background: str
    rgb: RGB
    things: tuple[Thing, ...]


def caption(scene: Scene) -> str:
    """Write the one correct caption of a scene."""
    things = sorted(scene.things, key=lambda thing: list(PALETTE).index(thing.colour))
    words = [_noun(things[0])]
    for thing, following in pairwise(things):
        words += [relation(scene, thing, following), _noun(following)]
    return f"{' '.join(words)} on a {scene.background} background"


def relation(scene: Scene, thing: Thing, other: Thing) -> str:
    """Say where `thing` is relative to `other`, along the axis that separates them most."""
    dx, dy = (thing.cx - other.cx) / scene.width, (thing.cy - other.cy) / scene.height
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def random_scene(
    rng: random.Random, count: int | None = None, canvas: tuple[int, int] | None = None
) -> Scene:
    """Draw a scene without ambiguity; `count` objects, or one to three with equal chance.

    Args:
        canvas: width and height in pixels; None for one of a random size, at most 4:3.
    """
    count = rng.randint(1, 3) if count is None else count
    while True:
        width, height = canvas or _random_canvas(rng)
        background = rng.choice(tuple(BACKGROUNDS))
        colours = sorted(rng.sample(range(len(PALETTE)), count))
        names = [tuple(PALETTE)[index] for index in colours]
        things = tuple(_random_thing(rng, name, width, height) for name in names)
        rgb = _jitter(rng, BACKGROUNDS[background], BACKGROUND_JITTER)
        scene = Scene(width, height, background, rgb, things)
        if is_clear(scene):
            return scene


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Draw scenes from a seed that training never uses; the first are the same for any count."""
    rng = random.Random(f"{seed}-held-out")
    return [random_scene(rng) for _ in range(count)]


def is_clear(scene: Scene) -> bool:
    """Return whether no boxes touch, and every relation that the caption names is clear."""
    apart = all(_apart(scene, a, b) for a, b in combinations(scene.things, 2))
    return apart and all(clear_relation(scene, a, b) for a, b in pairwise(scene.things))


def clear_relation(scene: Scene, a: Thing, b: Thing) -> bool:
    """Return whether one axis leads by `AXIS_MARGIN` when squashed, and also in pixels."""
    dx, dy = abs(a.cx - b.cx), abs(a.cy - b.cy)
    lead = dx / scene.width - dy / scene.height
    return abs(lead) >= AXIS_MARGIN and (lead > 0) == (dx > dy)


def draw(scene: Scene) -> Image.Image:
    """Draw the scene as an antialiased RGB image of its own canvas size."""
    image = Image.new("RGB", (scene.width, scene.height), scene.rgb)
    for thing in scene.things:
        mask, corner = _mask(thing)
        image.paste(thing.rgb, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return image


def outline(shape: str) -> list[tuple[float, float]]:
    """List the corners of a shape in the unit box [-0.5, 0.5]², y down; a circle has 64."""
    if shape == "square":
        return [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    if shape == "triangle":
        return [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    corners = 64 if shape == "circle" else 10
    radii = (0.5, 0.5) if shape == "circle" else (0.5, 0.21)
    turns = [(radii[i % 2], 2 * pi * i / corners) for i in range(corners)]
    points = [(radius * sin(angle), -radius * cos(angle)) for radius, angle in turns]
    if shape == "circle":
        return points
    return _fill_box(points)


def _fill_box(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    xs, ys = zip(*points, strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return [((x - min(xs)) / width - 0.5, (y - min(ys)) / height - 0.5) for x, y in points]


OUTLINES = {shape: outline(shape) for shape in SHAPES}


def _noun(thing: Thing) -> str:
    size = [] if thing.size == "medium" else [thing.size]
    words = [*size, thing.colour, thing.shape]
    return " ".join(["an" if words[0] == "orange" else "a", *words])


def _random_canvas(rng: random.Random) -> tuple[int, int]:
    short = rng.randint(128, 288)
    long = round(short * rng.uniform(1, 4 / 3))
    return (short, long) if rng.random() < 0.5 else (long, short)


def _random_thing(rng: random.Random, colour: str, width: int, height: int) -> Thing:
    short = min(width, height)
    size = rng.choice(tuple(SIZES))
    side = short * rng.uniform(*SIZES[size])
    inset = side / 2 + EDGE * short
    cx, cy = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
    rgb = _jitter(rng, PALETTE[colour], COLOUR_JITTER)
    return Thing(rng.choice(SHAPES), colour, size, rgb, cx, cy, side)


def _jitter(rng: random.Random, rgb: RGB, reach: int) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-reach, reach))) for value in rgb)
    return red, green, blue


def _apart(scene: Scene, a: Thing, b: Thing) -> bool:
    reach = (a.side + b.side) / 2 + GAP * min(scene.width, scene.height)
    return abs(a.cx - b.cx) >= reach or abs(a.cy - b.cy) >= reach


def _mask(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """Draw the coverage of a thing (mode L) over the pixels of its box; return their corner too."""
    left, top, right, bottom = thing.box
    x, y = int(left), int(top)
    size = int(right) + 1 - x, int(bottom) + 1 - y
    large = Image.new("L", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), 0)
    corners = [
        (
            (thing.cx + thing.side * u - x) * SUPERSAMPLE,
            (thing.cy + thing.side * v - y) * SUPERSAMPLE,
        )
        for u, v in OUTLINES[thing.shape]
    ]
    ImageDraw.Draw(large).polygon(corners, fill=255)
    return large.reduce(SUPERSAMPLE), (x, y)
