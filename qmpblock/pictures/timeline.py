"""A timeline as SVG 1.1: what took how long, and a moment of it drawn large, on an axis of its own.

::

    checked     ▌
    mirroring   ▐███████████████████▌ 8.0 s, 31M
    vd0         ▐▂▅▆▆▆▆▆▆▅▆▆▆▆▆▆▆▂▁▁▁▁▁   its rate
    memory                          ▐██▌ 1.1 s
                                   drawn large:
    held        the guest stands  ▐███▌ 6 ms
    ...

A wide page shows hours, in which what matters is milliseconds: so it has two axes. One file that
stands alone, without scripts. Every mark is at least a pixel wide, and pointing at it says what it
is.

Pure: strings out. Labels come from guests and peers, so they are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from qmpblock.errors import printable
from qmpblock.pictures.page import COLOURS, GREY, STYLE, xml

__all__ = ["Bar", "Row", "Timeline", "duration", "svg_timeline"]

_ROW, _BAR, _LEFT, _TOP, _RIGHT = 22, 16, 150, 66, 16  # pixels
_LABEL = 20  # characters
_NARROWEST = 600  # pixels
_LETTER = 6.6  # pixels of one, about
_STANDS = COLOURS[5]
_NICE = (1.0, 2.0, 5.0)
_TICKS = 8
_OVER = ".o{fill:#222;stroke:#fff;stroke-width:3;paint-order:stroke}"  # text on a bar
_FUNNEL = 34  # pixels from the one axis to the other


@dataclass(frozen=True)
class Bar:
    """Something that took some time.

    :ivar start: in seconds; `stop`.
    :ivar words: what is said of it when it is pointed at.
    """

    start: float
    stop: float
    words: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the picture.

    :ivar label: may come from a peer.
    :ivar bars: in their order; they do not overlap.
    :ivar said: stands beside them.
    :ivar colour: a number.
    :ivar heights: (seconds, how much by then): a row that has them shows how fast that grew, above
        its bars.
    """

    label: str
    bars: tuple[Bar, ...]
    said: str = ""
    colour: int = 0
    heights: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Timeline:
    """What is drawn.

    :ivar seconds: how long all took.
    :ivar rows: over all of it.
    :ivar moment: what is drawn large, from and to, in seconds; None: nothing.
    :ivar said: what that is, in words.
    :ivar within: rows of the part that is drawn large.
    """

    title: str
    seconds: float
    rows: tuple[Row, ...]
    moment: tuple[float, float] | None = None
    said: str = ""
    within: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where a moment lies across the page."""

    start: float
    stop: float
    pixels: int

    def x(self, seconds: float) -> float:
        share = (seconds - self.start) / max(1e-9, self.stop - self.start)
        return _LEFT + min(1.0, max(0.0, share)) * self.pixels


def svg_timeline(timeline: Timeline, *, width: int = 1200) -> str:
    """Draw it.

    :param width: in pixels, at least 600.
    """
    width = max(width, _NARROWEST)
    pixels = width - _LEFT - _RIGHT
    whole = _Scale(0.0, max(timeline.seconds, 1e-9), pixels)
    bottom = _TOP + len(timeline.rows) * _ROW
    body = [
        *_axis(whole, _TOP, bottom),
        *_moment(timeline, whole, bottom),
        *(
            line
            for i, row in enumerate(timeline.rows)
            for line in _row(row, whole, _TOP + i * _ROW)
        ),
    ]
    height = bottom + 16
    if timeline.moment is not None:
        lines, height = _large(timeline, timeline.moment, whole, bottom)
        body += lines
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<svg xmlns="http://www.w3.org/2000/svg" version="1.1" {size}>',
            f"<title>{xml(timeline.title)}</title>",
            f'<style type="text/css">{STYLE}{_OVER}</style>',
            f'<text class="h" x="8" y="20">{xml(timeline.title)}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def duration(seconds: float) -> str:
    """Write a time in three digits: `820 us`, `34.1 ms`, `7.65 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 0.000_999_5:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 0.999_5:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


# -- the moment


def _moment(timeline: Timeline, whole: _Scale, bottom: int) -> Iterator[str]:
    """Yield a stripe down through the rows where the moment is."""
    if timeline.moment is None:
        return
    left, right = (whole.x(at) for at in timeline.moment)
    left = min(left, _LEFT + whole.pixels - 2.0)
    yield (
        f'<rect x="{left:.2f}" y="{_TOP - 4}" width="{max(2.0, right - left):.2f}" '
        f'height="{bottom - _TOP + 4}" fill="{_STANDS}" fill-opacity="0.55">'
        f"<title>{xml(timeline.said)}</title></rect>"
    )


def _large(
    timeline: Timeline, moment: tuple[float, float], whole: _Scale, bottom: int
) -> tuple[list[str], int]:
    """Return the part that is drawn large, below the rest, and where the page ends."""
    start, stop = moment
    air = max(1e-6, stop - start) * 0.12
    large = _Scale(start - air, stop + air, whole.pixels)
    top = bottom + _FUNNEL + 34
    below = top + len(timeline.within) * _ROW + 4
    left, right = large.x(start), large.x(stop)
    ground = f'fill="{_STANDS}" fill-opacity="0.12"'
    shape = (
        f"M{whole.x(start):.2f},{bottom} L{left:.2f},{bottom + _FUNNEL} V{below} H{right:.2f} "
        f"V{bottom + _FUNNEL} L{whole.x(stop):.2f},{bottom} Z"
    )
    place = f'x="{(left + right) / 2:.2f}" y="{bottom + _FUNNEL - 6}"'
    lines = [
        f'<path d="{shape}" {ground}/>',
        f'<text class="h v" {place}>{xml(timeline.said)}</text>',
        *_axis(large, top, below, origin=start),
    ]
    for i, row in enumerate(timeline.within):
        lines += _row(row, large, top + i * _ROW)
    return lines, below + 12


# -- its parts


def _axis(scale: _Scale, top: int, bottom: int, *, origin: float = 0.0) -> Iterator[str]:
    """Yield round times from `origin` on, each with a line down through the rows."""
    step = _step(scale.stop - scale.start)
    for number in range(math.ceil((scale.start - origin) / step - 1e-9), 10_000):
        at = origin + number * step
        if at > scale.stop:
            return
        x = scale.x(at)
        late = x > _LEFT + scale.pixels - 30
        anchor = ' style="text-anchor:end"' if late else ' class="v"'
        sign = "-" if number < 0 else ""
        words = sign + duration(abs(number) * step) if number else "0"
        yield f'<text x="{x:.2f}" y="{top - 12}"{anchor}>{words}</text>'
        yield f'<path d="M{x:.2f},{top - 8} V{bottom}" stroke="{GREY}" stroke-opacity="0.35"/>'


def _step(seconds: float) -> float:
    """Return a round time that goes into so many seconds a few times."""
    for step in (60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 18000.0, 36000.0):
        if seconds > 240 and seconds / step <= _TICKS:
            return step
    rough = seconds / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next((n * power for n in _NICE if n * power >= rough), 10 * power)


def _row(row: Row, scale: _Scale, y: int) -> Iterator[str]:
    """Yield one row: its label, its bars, what is said beside them."""
    label = printable(row.label)
    short = label if len(label) <= _LABEL else f"{label[: _LABEL // 2]}…{label[1 - _LABEL // 2 :]}"
    yield f'<g><text x="8" y="{y + 12}">{xml(short)}<title>{xml(label)}</title></text>'
    colour = COLOURS[row.colour % len(COLOURS)]
    edge = _LEFT + scale.pixels
    first, last = float(edge), float(_LEFT)
    for number, bar in enumerate(row.bars):
        x = min(scale.x(bar.start), edge - 1.0)
        right = max(x + 1.0, scale.x(bar.stop))
        first, last = min(first, x), max(last, right)
        opacity = 0.25 if row.heights else (0.9, 0.5)[number % 2]  # neighbours differ
        yield (
            f'<rect x="{x:.2f}" y="{y}" width="{right - x:.2f}" height="{_BAR}" fill="{colour}" '
            f'fill-opacity="{opacity}"><title>{xml(f"{label}: {bar.words}")}</title></rect>'
        )
    yield from _heights(row, scale, y, colour)
    if row.said:
        yield _beside(row.said, first, last, edge, y)
    yield "</g>"


def _heights(row: Row, scale: _Scale, y: int, colour: str) -> Iterator[str]:
    """Yield how fast something grew: an area, as high as the bar where it was fastest."""
    rates = [
        (start, stop, (more - much) / (stop - start))
        for (start, much), (stop, more) in pairwise(row.heights)
        if stop > start
    ]
    most = max((rate for _, _, rate in rates), default=0.0)
    if most <= 0:
        return
    floor = y + _BAR
    points = [f"M{scale.x(rates[0][0]):.2f},{floor}"]
    for start, stop, rate in rates:
        height = floor - max(0.0, rate) / most * _BAR
        points.append(f"L{scale.x(start):.2f},{height:.2f} L{scale.x(stop):.2f},{height:.2f}")
    points.append(f"L{scale.x(rates[-1][1]):.2f},{floor} Z")
    yield f'<path d="{" ".join(points)}" fill="{colour}" fill-opacity="0.8" pointer-events="none"/>'


def _beside(said: str, first: float, last: float, edge: float, y: int) -> str:
    """Return text to the right of what was drawn, or to the left; on it where neither has room."""
    room = len(said) * _LETTER + 10
    if last + room <= edge:
        place = f'x="{last + 6:.2f}"'
    elif first - room >= _LEFT:
        place = f'x="{first - 6:.2f}" style="text-anchor:end"'
    else:
        place = f'x="{first + 6:.2f}" class="o"'
    return f'<text {place} y="{y + 12}">{xml(said)}</text>'
