"""SVG pictures: well formed, bounded, escaped, and nothing too small to see."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from qmpblock.extents.allocationmap import DATA, PRESENT, RESERVED, ZERO, AllocationMap
from qmpblock.pictures.svg import MOST_RECTS, svg_picture

NS = "{http://www.w3.org/2000/svg}"


def sparse(size: int, *extents: tuple[int, int, int]) -> AllocationMap:
    """Make a layer of (offset, length, flags) in nothing."""
    points = sorted({0, size, *(p for at, n, _ in extents for p in (at, at + n))})[:-1]
    flags = np.zeros(len(points), np.uint8)
    for at, _, value in extents:
        flags[points.index(at)] = value
    return AllocationMap(
        0, size, np.array(points, np.int64), np.zeros(len(points), np.int32), flags
    )


def rows(picture: str) -> list[list[ET.Element]]:
    """Return the marks of each strip: rects with a tooltip."""
    root = ET.fromstring(picture)
    return [
        [rect for rect in group.iter(f"{NS}rect") if rect.find(f"{NS}title") is not None]
        for group in root.findall(f"{NS}g")
    ]


def tip(rect: ET.Element) -> str:
    return rect.findtext(f"{NS}title") or ""


def test_marks_tell_exactly_what_they_cover() -> None:
    base = sparse(65536, (0, 512, PRESENT | DATA), (4096, 8192, PRESENT | ZERO | RESERVED))
    top = sparse(131072, (512, 512, PRESENT | ZERO))
    picture = svg_picture([("base", base), ("top", top)], AllocationMap.stack([top, base]))
    zeros, below, above, guest = rows(picture)
    assert [tip(r) for r in zeros] == ["implicit zeros: 0 to 131072 (128K): zeros"]
    assert sorted(map(tip, below)) == [
        "@1 base: 0 to 512 (512): data",
        "@1 base: 4096 to 12288 (8K): reserved zeros",
    ]
    assert [tip(r) for r in above] == ["@0 top: 512 to 1024 (512): zeros"]
    assert sorted(map(tip, guest)) == [
        "guest sees: 0 to 512 (512): data from @1",
        "guest sees: 4096 to 12288 (8K): reserved zeros from @1",
        "guest sees: 512 to 1024 (512): zeros from @0",
    ]


def test_names_are_escaped() -> None:
    own = sparse(8, (0, 8, PRESENT | DATA))
    name = "</text><script>alert(1)</script>&\"'\x1b\x00\ufffe]]>"
    picture = svg_picture([(name, own)], own, title=name)
    root = ET.fromstring(picture)
    assert not list(root.iter(f"{NS}script"))
    assert root.findtext(f"{NS}title") == "</text><script>alert(1)</script>&\"'\\x1b\\x00\\ufffe]]>"


@pytest.mark.parametrize("at", [0, 2**39, 2**40 - 65536])
def test_one_cluster_in_a_terabyte_is_a_pixel_wide_and_on_top(at: int) -> None:
    size, end = 2**40, at + 65536
    around = [(a, n, PRESENT | ZERO) for a, n in ((0, at), (end, size - end)) if n]
    own = sparse(size, (at, 65536, PRESENT | DATA), *around)
    marks = rows(svg_picture([("a", own)], own))[1]
    assert len(marks) == 1 + len(around)
    assert all(float(r.get("width", "0")) >= 1 for r in marks)
    assert tip(marks[-1]) == f"@0 a: {at} to {end} (64K): data"
    right = float(marks[-1].get("x", "0")) + float(marks[-1].get("width", "0"))
    assert right <= 1200


@pytest.mark.parametrize("width", [100, 1200, 4000])
def test_a_million_extents_make_a_bounded_picture(width: int) -> None:
    count = 1_000_000
    flags = np.where(np.arange(count) % 2, PRESENT | DATA, 0).astype(np.uint8)
    flags[: count // 2] = np.tile(
        np.array([0, PRESENT | ZERO], np.uint8), count // 4
    )  # two halves that differ
    offsets = np.arange(count, dtype=np.int64) * 65536
    own = AllocationMap(0, count * 65536, offsets, np.zeros(count, np.int32), flags)
    picture = svg_picture([("a", own)], own, width=width)
    assert all(0 < len(row) <= MOST_RECTS for row in rows(picture))
    assert len(picture) < 2_000_000
    words = " ".join(tip(r) for r in rows(picture)[1])
    assert "zeros" in words
    assert "data" in words


def test_an_empty_disk_has_a_picture() -> None:
    empty = AllocationMap.uniform(0, 0)
    assert len(rows(svg_picture([("none", empty)], empty))) == 3


def test_part_of_a_disk_with_layers_that_end_before_it() -> None:
    own, short = sparse(100, (50, 10, PRESENT | DATA)), sparse(10, (0, 10, PRESENT | DATA))
    part = AllocationMap.stack([own, short]).clip(40, 40)
    _, below, above, guest = rows(svg_picture([("short", short), ("a", own)], part))
    assert below == []
    assert [tip(r) for r in above] == ["@0 a: 50 to 60 (10): data"]
    assert [tip(r) for r in guest] == ["guest sees: 50 to 60 (10): data from @0"]
