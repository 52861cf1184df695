"""The picture in docs/architecture.md shows the imports between the rooms of the package."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_imports import MODULES, PACKAGE, imports

PICTURE = PACKAGE.parents[1] / "docs/rooms.svg"
PAGE = PACKAGE.parents[1] / "docs/architecture.md"
# Imported from everywhere, and importing none of the others: not drawn.
LEAVES = {"builtin", "error_codes", "errors", "signals"}


@dataclass(frozen=True)
class Arrow:
    """An arrow of the picture, and where its line begins and ends."""

    source: str
    target: str
    only: str | None
    line: tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """The rooms with their boxes (x, y, width, height), and the arrows."""

    rooms: dict[str, tuple[float, float, float, float]]
    arrows: list[Arrow]


def read_picture() -> Picture:
    rooms, arrows = {}, []
    for element in ET.parse(PICTURE).iter():
        if name := element.get("data-room"):
            box = [float(element.attrib[key]) for key in ("x", "y", "width", "height")]
            assert name not in rooms
            rooms[name] = (box[0], box[1], box[2], box[3])
        if source := element.get("data-from"):
            x1, y1, x2, y2 = map(
                float, element.attrib["d"].replace("M", "").replace("L", "").split()
            )
            only = element.get("data-only")
            arrows.append(Arrow(source, element.attrib["data-to"], only, (x1, y1, x2, y2)))
    return Picture(rooms, arrows)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def real_imports() -> dict[tuple[str, str], set[str]]:
    """Each import from one room into another, with the names of the files that have it."""
    rooms = {room_of(path) for path in MODULES}
    found: dict[tuple[str, str], set[str]] = {}
    for path in MODULES:
        for module in imports(path):
            if module.startswith("vlmport."):
                source, target = room_of(path), module.split(".")[1]
                if source != target and target in rooms:
                    found.setdefault((source, target), set()).add(path.name)
    return {pair: names for pair, names in found.items() if not pair[0].startswith("__")}


def reachable(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """All pairs that a way along the arrows connects."""
    pairs = set(arrows)
    while True:
        more = {(a, d) for a, b in pairs for c, d in arrows if b == c} - pairs
        if not more:
            return pairs
        pairs |= more


def test_the_picture_has_every_room() -> None:
    rooms = {room_of(path) for path in MODULES} - LEAVES
    assert set(read_picture().rooms) == {room for room in rooms if not room.startswith("__")}


def test_each_arrow_is_an_import() -> None:
    real = real_imports()
    for arrow in read_picture().arrows:
        files = real.get((arrow.source, arrow.target), set())
        assert files, f"{arrow.source} does not import {arrow.target}"
        if arrow.only is None:
            assert files != {"reference.py"}, arrow
        else:
            assert files == {arrow.only}, arrow


def test_each_import_follows_the_arrows() -> None:
    picture = read_picture()
    solid = {(arrow.source, arrow.target) for arrow in picture.arrows if arrow.only is None}
    dashed = {(arrow.source, arrow.target, arrow.only) for arrow in picture.arrows if arrow.only}
    allowed = reachable(solid)
    for (source, target), files in real_imports().items():
        if target not in LEAVES and (source, target) not in allowed:
            for name in files:
                assert (source, target, name) in dashed, f"{source} imports {target} in {name}"


def test_the_arrows_go_in_no_circle() -> None:
    solid = {(arrow.source, arrow.target) for arrow in read_picture().arrows if arrow.only is None}
    assert not [source for source, target in reachable(solid) if source == target]


def test_what_is_not_drawn_imports_no_room() -> None:
    assert not [pair for pair in real_imports() if pair[0] in LEAVES and pair[1] not in LEAVES]


@pytest.mark.parametrize("arrow", read_picture().arrows, ids=lambda a: f"{a.source}-{a.target}")
def test_an_arrow_is_drawn_between_its_rooms(arrow: Arrow) -> None:
    rooms = read_picture().rooms
    for name, x, y in [(arrow.source, *arrow.line[:2]), (arrow.target, *arrow.line[2:])]:
        left, top, width, height = rooms[name]
        inside = left <= x <= left + width and top <= y <= top + height
        on_edge = x in (left, left + width) or y in (top, top + height)
        assert inside, (name, x, y)
        assert on_edge, (name, x, y)


def test_the_page_has_a_row_for_every_room() -> None:
    page = PAGE.read_text("utf-8")
    for room in {room_of(path) for path in MODULES} - {"__init__", "__main__", "error_codes"}:
        assert f"| `{room}" in page, room
