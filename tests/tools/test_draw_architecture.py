"""tools/draw_architecture.py: the picture says what the contracts and the tree say, all of it."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"

PYPROJECT = """
[[tool.importlinter.contracts]]
name = "Down only"
type = "layers"
containers = ["qmpblock"]
layers = ["__main__", "shop", "cellar | attic", "stone : sand"]

[[tool.importlinter.contracts]]
name = "Inside"
type = "layers"
containers = ["qmpblock.cellar"]
layers = ["door", "wine | beer"]

[[tool.importlinter.contracts]]
name = "Clean"
type = "forbidden"
source_modules = ["qmpblock.attic", "qmpblock.cellar.wine"]
forbidden_modules = ["asyncio"]

[[tool.importlinter.contracts]]
name = "Guests"
type = "forbidden"
source_modules = ["qmpblock.testing"]
forbidden_modules = ["qmpblock.cellar", "qmpblock.shop"]
"""
README = """
```
qmpblock/            all of it
  shop/              where `things` are sold; and
                     bought & paid
  cellar/            below
  attic.py           above
  stone.py
  sand.py            what it stands on
  testing/           others
fixtures/            not of the package
```
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "draw_architecture", ROOT / "tools/draw_architecture.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


tool = load()


def names(floors):
    return [[room.name for room in floor] for floor in floors]


def test_floors_and_rooms_are_those_of_the_contracts():
    house = tool.read(PYPROJECT, README)
    assert house.roof == "__main__"
    assert names(house.floors) == [["shop/"], ["cellar/", "attic.py"], ["stone.py", "sand.py"]]
    assert [room.joined for floor in house.floors for room in floor] == [False] * 4 + [True]
    assert names(house.floors[1][0].inside) == [["door"], ["wine", "beer"]]
    assert house.rules == ("Down only", "Clean", "Guests")
    assert house.ground == 1


def test_what_is_pure_is_told():
    cellar, attic = tool.read(PYPROJECT, README).floors[1]
    assert (cellar.kind, attic.kind) == ("room", "pure")
    assert [room.kind for room in cellar.inside[1]] == ["pure", "room"]


def test_what_a_room_is_for_is_its_line_in_the_tree():
    house = tool.read(PYPROJECT, README)
    assert house.floors[0][0].purpose == "where `things` are sold; and bought & paid"
    assert house.ground_purpose == "what it stands on"
    assert house.harness.purpose == "others"


def test_all_of_it_is_drawn():
    picture = ET.fromstring(tool.draw(tool.read(PYPROJECT, README)))
    words = " ".join(text.text or "" for text in picture.iter(f"{SVG}text"))
    for wanted in (
        *("shop/", "cellar/", "attic.py", "door", "wine", "beer", "stone.py", "sand.py"),
        *("testing/", "Down only", "Clean", "Guests", "where things are sold"),
    ):
        assert wanted in words


def boxes(picture):
    """Every box but the page: left, top, right, bottom."""
    for box in [*picture.iter(f"{SVG}rect")][1:]:
        x, y, width, height = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        if box.get("stroke"):
            yield x, y, x + width, y + height


def crowded(count):
    """A house in which one room of the cellar's is on a floor with many others."""
    many = " | ".join(f"bottle_of_year_{1900 + number}" for number in range(count))
    return tool.read(PYPROJECT.replace("wine | beer", many), README)


HOUSES = pytest.mark.parametrize(
    "house",
    [
        tool.read((ROOT / "pyproject.toml").read_text(), (ROOT / "README.md").read_text()),
        *map(crowded, (3, 4, 11)),
    ],
    ids=("ours", "3", "4", "11"),
)


@HOUSES
def test_no_two_rooms_overlap_but_by_one_in_the_other(house):
    found = list(boxes(ET.fromstring(tool.draw(house))))
    assert len(found) > 10
    for one in found:
        for other in found:
            apart = (
                one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            )
            inside = all(
                (a >= b if low else a <= b)
                for a, b, low in zip(one, other, (1, 1, 0, 0), strict=True)
            )
            around = all(
                (a <= b if low else a >= b)
                for a, b, low in zip(one, other, (1, 1, 0, 0), strict=True)
            )
            assert apart or inside or around, (one, other)


@HOUSES
def test_no_word_leaves_the_picture_or_its_room(house):
    picture = ET.fromstring(tool.draw(house))
    found = list(boxes(picture))
    width, height = float(picture.get("width")), float(picture.get("height"))
    for text in picture.iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        style = text.get("class") or ""
        letter = 8.5 if style == "n" else 6.7 if "s" in style else 6.35
        wide = len(text.text) * letter
        left = x - wide / 2 if "m" in style else x
        assert 0 < y < height
        if text.get("transform"):
            continue
        assert left >= 0
        assert left + wide <= width, text.text
        around = [box for box in found if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
        if around:  # the smallest
            right = min(around, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))[2]
            assert left + wide <= right, text.text


@pytest.mark.parametrize("what", ["name", "purpose"])
def test_another_house_is_another_picture(what):
    before = tool.draw(tool.read(PYPROJECT, README))
    if what == "name":
        after = tool.read(PYPROJECT.replace('"shop"', '"shop | loft"'), README)
    else:
        after = tool.read(PYPROJECT, README.replace("below", "beneath"))
    assert tool.draw(after) != before
