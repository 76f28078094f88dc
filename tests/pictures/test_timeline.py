"""Timelines as SVG: well formed, bounded, escaped; what is short is drawn large."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from qmpblock.pictures.timeline import Bar, Row, Timeline, duration, svg_timeline

NS = "{http://www.w3.org/2000/svg}"
HOUR = 3600.0


def marks(picture: str, tag: str = "rect") -> list[tuple[str, float, float]]:
    """Return what each mark of a row says, where it begins and how wide it is."""
    return [
        (
            one.findtext(f"{NS}title") or "",
            float(one.get("x", "0")),
            float(one.get("width", "0")),
        )
        for group in ET.fromstring(picture).findall(f"{NS}g")
        for one in group.iter(f"{NS}{tag}")
    ]


def texts(picture: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(picture).iter(f"{NS}text")]


def test_bars_lie_to_scale() -> None:
    rows = (Row("one", (Bar(0, 5, "first"),)), Row("two", (Bar(5, 10, "second"),)))
    (first, x, wide), (second, after, as_wide) = marks(svg_timeline(Timeline("", 10, rows)))
    assert (first, second) == ("one: first", "two: second")
    assert x + wide == pytest.approx(after)
    assert wide == pytest.approx(as_wide)


def test_what_takes_milliseconds_in_hours_is_seen_and_drawn_large() -> None:
    start = 2 * HOUR
    stands = (start, start + 0.030)
    within = (
        Row("held", (Bar(start, start + 0.010),)),
        Row("sent", (Bar(start + 0.010, stands[1]),)),
    )
    rows = (Row("all", (Bar(0, start),)), Row("end", (Bar(start, start + 0.05),)))
    picture = svg_timeline(Timeline("", start + 0.05, rows, stands, "it stands: 30 ms", within))
    _, (_, at, hair), (_, _, held), (_, _, sent) = marks(picture)
    assert hair >= 1
    assert at + hair <= 1200
    assert held > 200
    assert sent == pytest.approx(2 * held, rel=0.01)
    assert "it stands: 30 ms" in texts(picture)
    assert {"10 ms", "20 ms", "30 ms", "20 min", "2 h"} <= set(texts(picture))


def test_where_there_is_no_moment_nothing_is_drawn_large() -> None:
    picture = svg_timeline(Timeline("", 1, (Row("one", (Bar(0, 1),)),)))
    assert len(marks(picture)) == 1
    assert not [one for one in ET.fromstring(picture).findall(f"{NS}path") if one.get("fill")]


def test_names_are_escaped() -> None:
    name = "</text><script>alert(1)</script>&\"'\x1b\x00\ufffe]]>"
    row = Row(name, (Bar(0, 1, name),), name, heights=((0, 0), (1, 1)))
    picture = svg_timeline(Timeline(name, 1, (row,), (0.4, 0.5), name, (row,)))
    root = ET.fromstring(picture)
    assert not list(root.iter(f"{NS}script"))
    assert root.findtext(f"{NS}title") == "</text><script>alert(1)</script>&\"'\\x1b\\x00\\ufffe]]>"


def test_a_rate_is_an_area_as_high_as_its_bar_where_it_was_fastest() -> None:
    row = Row("disk", (Bar(0, 3),), heights=((0, 0), (1, 10), (2, 15), (2, 15), (3, 15)))
    [group] = ET.fromstring(svg_timeline(Timeline("", 3, (row,)))).findall(f"{NS}g")
    [area] = group.findall(f"{NS}path")
    heights = [float(point.split(",")[1].split()[0]) for point in area.get("d", "").split("L")[1:]]
    floor = max(heights)
    assert [floor - height for height in heights] == [16, 16, 8, 8, 0, 0, 0]


def test_what_never_moved_has_no_area() -> None:
    row = Row("disk", (Bar(0, 3),), heights=((0, 0), (3, 0)))
    [group] = ET.fromstring(svg_timeline(Timeline("", 3, (row,)))).findall(f"{NS}g")
    assert not group.findall(f"{NS}path")


@pytest.mark.parametrize("width", [100, 600, 4000])
@pytest.mark.parametrize("seconds", [0.0, 1e-7, 0.5, 59.99, 3601.0, 1e6])
def test_any_time_and_any_width(seconds: float, width: int) -> None:
    row = Row("r", (Bar(0, seconds, "x"),), "some words that stand beside it")
    picture = svg_timeline(Timeline("", seconds, (row,), (0, seconds), "", (row,)), width=width)
    wide = float(ET.fromstring(picture).get("width", "0"))
    assert wide == max(width, 600)
    for _, x, length in marks(picture):
        assert length >= 1
        assert x + length <= wide
    assert len(picture) < 20_000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 us"),
        (0.00082, "820 us"),
        (0.0341, "34.1 ms"),
        (0.9999, "1 s"),
        (7.654, "7.65 s"),
        (59.99, "1 min"),
        (200, "3 min 20 s"),
        (3599.9, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_told_in_few_digits(seconds: float, said: str) -> None:
    assert duration(seconds) == said
