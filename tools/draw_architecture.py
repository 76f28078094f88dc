"""Draw docs/architecture.svg: the rooms of the package, floor by floor.

The floors are the contracts of import-linter in pyproject.toml, which `make check` keeps, and what
a room is for is its line in README.md's tree. So the picture cannot say anything else than these
do; a test fails where the file is another than what is drawn now. To draw it anew:

    python tools/draw_architecture.py
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

# Pixels.
WIDTH, LEFT, RIGHT, HARNESS = 1000, 52, 16, 150
GAP, PAD, LINE, NAME, SMALL = 8, 10, 16, 20, 20
ROOF = 80
LETTER, CODE = 6.6, 6.7  # how wide one is in prose, and in small names

# Light grounds under dark letters; as in the maps, from Okabe and Ito's colours.
FILLS = {
    "room": "#e3eef6",
    "pure": "#ddf1ea",
    "ground": "#f0f0f0",
    "floor": "#fff",
    "harness": "#fbeed5",
}
EDGES = {
    "room": "#0072B2",
    "pure": "#009E73",
    "ground": "#808080",
    "floor": "#808080",
    "harness": "#E69F00",
}
STYLE = (
    "text{font:12px sans-serif;fill:#333}"
    ".n{font:bold 14px monospace;fill:#111}"
    ".s{font:11px monospace;fill:#111}"
    ".h{font-size:17px;fill:#111}"
    ".m{text-anchor:middle}"
)


@dataclass(frozen=True)
class Room:
    """One module or package.

    :ivar joined: whether it and the one on its left may know each other.
    :ivar inside: the floors of a package that has its own.
    """

    name: str
    purpose: str = ""
    kind: str = "room"
    joined: bool = False
    inside: tuple[tuple[Room, ...], ...] = ()


@dataclass(frozen=True)
class House:
    """All that the picture shows: floors from the top down.

    :ivar roof: what stands above all of them, and is only an entrance.
    :ivar ground: how many of the floors the harness, too, stands on.
    :ivar rules: the names of the contracts: of layers, of what is pure, of the harness.
    """

    roof: str
    floors: tuple[tuple[Room, ...], ...]
    ground: int
    ground_purpose: str
    harness: Room
    rules: tuple[str, str, str]


def contracts(pyproject: str) -> list[dict[str, Any]]:
    """Read the contracts of import-linter."""
    found: list[dict[str, Any]] = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    return found


def purposes(readme: str) -> dict[str, str]:
    """Read what each room is for in the tree of README.md, by its name as it stands there."""
    tree = readme.partition("\nqmpblock/  ")[2].partition("\nfixtures/")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in tree.splitlines()[1:]:
        words, _, text = line.strip().partition("  ")
        row = words.split()
        if all(re.fullmatch(r"\w+(\.py|/)", word) for word in row):
            # The names of one line may go on in the next; then comes what they are for.
            names = row if not names or found.get(names[-1]) else names + row
        else:
            text = line.strip()
        for name in names:
            found[name] = f"{found.get(name, '')} {text.strip()}".strip()
    return found


def read(pyproject: str, readme: str) -> House:
    """Read the house from the contracts and the tree."""
    layered = {one["containers"][0]: one for one in contracts(pyproject) if "containers" in one}
    forbidden = [one for one in contracts(pyproject) if one["type"] == "forbidden"]
    [pure] = [one for one in forbidden if "asyncio" in one["forbidden_modules"]]
    [alone] = [one for one in forbidden if one["source_modules"] == ["qmpblock.testing"]]
    said = purposes(readme)

    def rooms(package: str) -> Iterator[tuple[Room, ...]]:
        for layer in layered[package]["layers"]:
            floor = []
            for separator, word in re.findall(r"([|:]?)\s*(\w+)", layer):
                path = f"{package}.{word}"
                name = f"{word}/" if f"{word}/" in said else f"{word}.py"
                floor.append(
                    Room(
                        name if package == "qmpblock" else word,
                        said.get(name, ""),
                        "pure" if path in pure["source_modules"] else "room",
                        separator == ":",
                        tuple(rooms(path)) if path in layered else (),
                    )
                )
            yield tuple(floor)

    top, *floors = rooms("qmpblock")
    shut = {path.removeprefix("qmpblock.") for path in alone["forbidden_modules"]}
    is_open = [
        all(re.split("[./]", room.name)[0] not in shut for room in floor) for floor in floors
    ]
    ground = len(list(takewhile(bool, reversed(is_open))))
    # Of the ground, one line says it for all.
    [words] = {room.purpose for floor in floors[-ground:] for room in floor}
    harness = Room("testing/", said["testing/"], "harness")
    rules = (layered["qmpblock"]["name"], pure["name"], alone["name"])
    return House(top[0].name.removesuffix(".py"), tuple(floors), ground, words, harness, rules)


def draw(house: House) -> str:
    """Draw it, as SVG 1.1."""
    body: list[str] = []
    y = ROOF
    right = WIDTH - RIGHT
    for floor in house.floors[: -house.ground]:
        body_of_floor, height = _floor(floor, LEFT, right - HARNESS - GAP, y)
        body += body_of_floor
        y += height + GAP
    body += _room(house.harness, right - HARNESS, ROOF, HARNESS, y - GAP - ROOF)
    top = y
    y += PAD + LINE
    ground: list[str] = []
    for floor in house.floors[-house.ground :]:
        body_of_floor, height = _small_floor(floor, LEFT + PAD, right - PAD, y)
        ground += body_of_floor
        y += height + GAP // 2
    y += PAD - GAP // 2
    body += _box("ground", LEFT, top, right - LEFT, y - top)
    body += _text(LEFT + PAD, top + PAD + 8, house.ground_purpose)
    body += ground
    foot = _legend(house, y + 24)
    height = y + 24 + 3 * LINE
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            "<!-- Drawn by tools/draw_architecture.py from pyproject.toml and README.md. -->",
            f'<svg xmlns="http://www.w3.org/2000/svg" version="1.1" {size}>',
            "<title>The rooms of qmpblock, floor by floor</title>",
            f'<style type="text/css">{STYLE}</style>',
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
            *_roof(house.roof, right),
            *_arrow(house.rules[0], ROOF, y),
            *body,
            *foot,
            "</svg>",
            "",
        ]
    )


def _roof(entrance: str, right: int) -> Iterator[str]:
    middle = (LEFT + right) // 2
    points = f"{LEFT - 12},{ROOF - GAP} {middle},12 {right + 12},{ROOF - GAP}"
    yield f'<polygon points="{points}" fill="#fff" stroke="{EDGES["room"]}" stroke-width="1.5"/>'
    yield f'<text class="h m" x="{middle}" y="{ROOF - 34}">qmpblock</text>'
    yield f'<text class="s m" x="{middle}" y="{ROOF - 17}">{escape(entrance)}</text>'


def _arrow(rule: str, top: int, bottom: int) -> Iterator[str]:
    x = LEFT // 2
    yield (
        f'<path d="M{x} {top} V{bottom - 8} M{x - 6} {bottom - 14} L{x} {bottom - 4} '
        f'L{x + 6} {bottom - 14}" fill="none" stroke="#333" stroke-width="1.5"/>'
    )
    middle = (top + bottom) // 2
    yield f'<rect x="{x - 9}" y="{middle - 82}" width="18" height="164" fill="#fff"/>'
    yield (
        f'<text class="m" x="{x}" y="{middle}" transform="rotate(-90 {x} {middle})" dy="4">'
        f"{escape(rule)}</text>"
    )


def _widths(floor: Sequence[Room], wanted: Sequence[float], total: int) -> list[tuple[int, int]]:
    """Share a floor out; return where each room begins, from 0, and how wide it is."""
    gaps = [0 if room.joined else GAP for room in floor[1:]]
    free = total - sum(gaps)
    found, x, given = [], 0, 0.0
    for number, share in enumerate(wanted):
        x += gaps[number - 1] if number else 0
        before = round(given)
        given += free * share / sum(wanted)
        found.append((x, round(given) - before))
        x += round(given) - before
    return found


def _floor(floor: Sequence[Room], left: int, right: int, y: int) -> tuple[list[str], int]:
    # One with floors of its own needs more room; else all are alike.
    shares = [2.6 if room.inside else 1.0 for room in floor]
    places = _widths(floor, shares, right - left)
    height = max(_height(room, width) for room, (_, width) in zip(floor, places, strict=True))
    lines: list[str] = []
    for room, (x, width) in zip(floor, places, strict=True):
        lines += _room(room, left + x, y, width, height)
    return lines, height


def _lines(floor: Sequence[Room], width: int) -> list[Sequence[Room]]:
    """Break a floor of rooms that only have their names into as few lines as have room for them."""
    for count in range(1, len(floor) + 1):
        each = -(-len(floor) // count)
        lines = [floor[first : first + each] for first in range(0, len(floor), each)]
        needed = max(
            sum(len(room.name) * CODE + PAD + GAP for room in line) - GAP for line in lines
        )
        if needed <= width - (GAP if count > 1 else 0):
            return lines
    return [[room] for room in floor]


def _tall(floor: Sequence[Room], width: int) -> int:
    """Return how tall such a floor is; one of several lines has a border around them."""
    count = len(_lines(floor, width))
    return count * (SMALL + GAP // 2) + (GAP // 2 if count > 1 else -GAP // 2)


def _small_floor(floor: Sequence[Room], left: int, right: int, y: int) -> tuple[list[str], int]:
    """Draw a floor of rooms that only have their names."""
    tall, broken = _tall(floor, right - left), _lines(floor, right - left)
    drawn: list[str] = []
    if len(broken) > 1:
        drawn += _box("floor", left, y, right - left, tall)
        left, right, y = left + GAP // 2, right - GAP // 2, y + GAP // 2
    for line in broken:
        places = _widths(line, [len(room.name) + 4.0 for room in line], right - left)
        for room, (x, width) in zip(line, places, strict=True):
            drawn += _box(room.kind, left + x, y, width, SMALL)
            drawn += _text(left + x + width // 2, y + SMALL - 6, room.name, "s m")
        y += SMALL + GAP // 2
    return drawn, tall


def _wrapped(room: Room, width: int) -> list[str]:
    return textwrap.wrap(room.purpose.replace("`", ""), int((width - 2 * PAD) / LETTER))


def _height(room: Room, width: int) -> int:
    return (
        PAD
        + NAME
        + LINE * len(_wrapped(room, width))
        + sum(_tall(floor, width - 2 * PAD) + GAP // 2 for floor in room.inside)
        + (PAD if room.inside else PAD // 2)
    )


def _room(room: Room, x: int, y: int, width: int, height: int) -> list[str]:
    lines = _box(room.kind, x, y, width, height)
    y += PAD + NAME - 8
    lines += _text(x + PAD, y, room.name, "n")
    for line in _wrapped(room, width):
        y += LINE
        lines += _text(x + PAD, y, line)
    y += GAP
    for floor in room.inside:
        drawn, tall = _small_floor(floor, x + PAD, x + width - PAD, y)
        lines += drawn
        y += tall + GAP // 2
    return lines


def _box(kind: str, x: int, y: int, width: int, height: int) -> list[str]:
    size = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="3"'
    return [f'<rect {size} fill="{FILLS[kind]}" stroke="{EDGES[kind]}"/>']


def _text(x: int, y: int, text: str, style: str = "") -> list[str]:
    what = f' class="{style}"' if style else ""
    return [f'<text{what} x="{x}" y="{y}">{escape(text)}</text>']


def _legend(house: House, y: int) -> list[str]:
    lines: list[str] = []
    x = LEFT
    for kind, rule in zip(("pure", "harness"), house.rules[1:], strict=True):
        lines += _box(kind, x, y - 10, 18, 12)
        lines += _text(x + 26, y, rule)
        x += 26 + int(len(rule) * LETTER) + 24
    return lines + _text(
        LEFT,
        y + LINE + 2,
        "Rooms of one floor do not import each other either, unless they touch.",
    )


def main() -> None:
    """Write the picture."""
    pyproject, readme = ROOT / "pyproject.toml", ROOT / "README.md"
    house = read(pyproject.read_text(encoding="utf-8"), readme.read_text(encoding="utf-8"))
    PICTURE.write_text(draw(house), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
