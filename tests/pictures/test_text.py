"""Text pictures: the seed's drawings, widths, hostile labels, and every mark's meaning."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.extents.allocationmap import DATA, PRESENT, RESERVED, ZERO, AllocationMap
from qmpblock.pictures.strips import grid, layer_strip, layer_strips
from qmpblock.pictures.text import ASCII, UNICODE, strip_marks, text_lines, text_picture

# Correct, not quick: the machine may be busy with other tests.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CLUSTER = 65536
_CELLS = {" ": 0, "0": PRESENT | ZERO, "R": PRESENT | ZERO | RESERVED}


def layer(drawing: str, unit: int = CLUSTER) -> AllocationMap:
    """Read a layer as the seed draws it: a letter is data, 0 zeros, a space nothing."""
    count = len(drawing)
    return AllocationMap(
        0,
        count * unit,
        np.arange(count, dtype=np.int64) * unit,
        np.zeros(count, np.int32),
        np.array([_CELLS.get(c, PRESENT | DATA) for c in drawing], np.uint8),
    )


def drawn(*drawings: str) -> list[str]:
    """Draw layers given from the base to the active one; return the strips, zeros on top."""
    own = [layer(d) for d in drawings]
    guest = AllocationMap.stack(own[::-1])
    strips = layer_strips([("", o) for o in own], guest, grid(0, guest.stop, 9))
    lines = text_lines(strips, width=29, legend=False)
    return [line[16:] for line in lines[2:]]


# What the seed (April 2011) draws, left and right of each arrow. Drawings 6 and 7 forget the
# disk's own Y on the right; copy-on-write keeps it.
SEED = [
    (["         "], ["000000000", "·········", "·········"]),
    (["000000000"], ["000000000", "000000000", "000000000"]),
    (["00000    "], ["000000000", "00000····", "00000····"]),
    (["X XX  X X"], ["000000000", "█·██··█·█", "█·██··█·█"]),
    (["X0XX00X0X"], ["000000000", "█0██00█0█", "█0██00█0█"]),
    (["X0XX0 X X"], ["000000000", "█0██0·█·█", "█0██0·█·█"]),
    (
        ["X XX  X X", "         "],
        ["000000000", "█·██··█·█", "·········", "█·██··█·█", "1·11··1·1"],
    ),
    (
        ["X XX  X X", "YYY      "],
        ["000000000", "█·██··█·█", "███······", "████··█·█", "0001··1·1"],
    ),
    (["YYYX  X X"], ["000000000", "████··█·█", "████··█·█"]),
    (["YYYX00X0X"], ["000000000", "████00█0█", "████00█0█"]),
    (
        ["  ZZ   Z ", "X X   X X", "YY Y     "],
        ["000000000", "··██···█·", "█·█···█·█", "██·█·····", "████··███", "0010··121"],
    ),
    (["YYXY00XZX"], ["000000000", "████00███", "████00███"]),
]


@pytest.mark.parametrize(("layers", "picture"), SEED, ids=["/".join(d) for d, _ in SEED])
def test_the_drawings_of_the_seed(layers: list[str], picture: list[str]) -> None:
    assert drawn(*layers) == picture


def test_a_whole_picture() -> None:
    """Three layers, the middle one short: past its end it hides the base."""
    layers = [
        ("base.raw", layer("X XX  X X0RR")),
        ("mid", layer("  ZZ   ")),
        ("top", layer("YY Y    0   ")),
    ]
    guest = AllocationMap.stack([own for _, own in reversed(layers)])
    assert (
        text_picture(layers, guest, width=52)
        == """\
                0        192K     384K     576K 768K
                ├────────┼────────┼────────┼───────┤
implicit zeros  000000000000000000000000000000000000
@2 base.raw     ███···██████······███···███000RRRRRR
@1 mid          ······██████·········│
@0 top          ██████···███············000·········
guest sees      ████████████······███···000·········
from layer      000000111000······222···000·········

█ data   0 zeros   R reserved zeros   · not held
│ the layer ends
"""
    )


def test_ascii_is_ascii_whatever_the_labels_are() -> None:
    own = layer("X 0RY")
    picture = text_picture([("bäse.raw", own)], own, ascii=True)
    assert picture.isascii()
    assert "b\\xe4se.raw" in picture


def test_a_hostile_label_reaches_no_terminal() -> None:
    own = layer("X")
    picture = text_picture([("evil\x1b[2J\n\u202e.raw", own)], own, width=100)
    assert "\x1b" not in picture
    assert "\u202e" not in picture
    assert "evil\\x1b[2J\\n\\u202e.raw" in picture


@pytest.mark.parametrize("width", [0, 20, 21, 33, 40, 80, 81, 200])
@pytest.mark.parametrize(
    "name", ["a", "a-very-long-name-of-an-image-that-says-little.qcow2", "卷" * 40]
)
def test_lines_fit_the_terminal_and_align(width: int, name: str) -> None:
    own = layer("X 0 R" * 3)
    picture = text_picture([(name, own)] * 12, AllocationMap.stack([own] * 12), width=width)
    lines = picture.split("\n\n")[0].splitlines()
    wide = [len(line) + sum(c == "卷" for c in line) for line in lines]
    assert max(wide) <= max(width, 20)
    if width != 0:
        assert max(wide[1:]) == width, "the strips use the whole width"


def test_a_hundred_and_fifty_layers_all_show() -> None:
    own = layer("X" + " " * 8)
    layers = [(f"layer{i}", own) for i in range(150)]
    lines = text_picture(layers, AllocationMap.stack([own] * 150), width=80).splitlines()
    rows = [line for line in lines if line.startswith("@")]
    assert len(rows) == 150
    assert rows[0].startswith("@149 * layer0 ")
    assert rows[139].startswith("@10  a layer139 ")
    assert rows[149].startswith("@0     layer149 ")
    assert len({line.index("█") for line in rows}) == 1


def test_one_cluster_in_a_terabyte_shows() -> None:
    at, size = 700 * 2**30, 2**40
    flags = np.array([0, PRESENT | DATA, 0], np.uint8)
    offsets = np.array([0, at, at + CLUSTER], np.int64)
    own = AllocationMap(0, size, offsets, np.zeros(3, np.int32), flags)
    picture = text_picture([("big", own)], own, width=80)
    assert picture.count(UNICODE.trace) == 3, "in the layer, in what the guest sees, in the legend"


def test_colours_of_layers_and_nothing_else() -> None:
    layers = [("base", layer("XX ")), ("top", layer("Y  "))]
    guest = AllocationMap.stack([layers[1][1], layers[0][1]])
    coloured = text_picture(layers, guest, color=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == text_picture(layers, guest)
    sees = next(line for line in coloured.splitlines() if line.startswith("guest"))
    assert re.findall("38;5;(\\d+)m", sees) == ["32", "214"]
    for line in coloured.splitlines():
        assert line.count("\x1b[0m") == line.count("\x1b[") / 2, "every style is ended"


def test_part_of_a_disk_has_its_own_offsets() -> None:
    own = layer("X X X X X")
    part = AllocationMap.stack([own]).clip(2 * CLUSTER, 4 * CLUSTER)
    picture = text_picture([("a", own)], part, width=60)
    assert picture.splitlines()[0].split() == ["128K", "192K", "256K", "320K", "384K"]


def test_an_empty_disk_has_a_picture() -> None:
    empty = AllocationMap.uniform(0, 0)
    assert "@0 none" in text_picture([("none", empty)], empty)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 3, 11, 5, 7])), min_size=1),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_every_mark_says_what_its_cell_holds(
    runs: list[tuple[int, int]], cells: int, more: int
) -> None:
    content = "".join({0: " ", 3: "0", 11: "R", 5: "X", 7: "0"}[f] * n for n, f in runs)
    own = layer(content, unit=1)
    edges = grid(0, len(content) + more, cells)
    marks = strip_marks(layer_strip("a", own, 0, edges), ASCII)
    ended = False
    for mark, start, stop in zip(marks, edges[:-1], edges[1:], strict=True):
        cell = content[start:stop]
        if not cell:
            assert mark == (" " if ended else "|")
            ended = True
        elif "X" in cell:
            share = cell.count("X") / len(cell)
            expected = (
                "#" if share == 1 else "%" if share >= 1 / 2 else "+" if share >= 1 / 8 else ":"
            )
            assert mark == expected
        elif "R" in cell:
            assert mark == ("R" if set(cell) == {"R"} else "r")
        elif "0" in cell:
            assert mark == ("0" if set(cell) == {"0"} else "o")
        else:
            assert mark == "."
