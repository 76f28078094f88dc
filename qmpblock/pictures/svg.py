"""Pictures of maps as SVG 1.1: the strips of `qmpblock.pictures.strips`, to scale.

One file that stands alone, without scripts. Maps of few extents are drawn extent by
extent; larger ones by columns of pixels, shaded by how much data each holds. Every mark is
at least a pixel wide, and pointing at it names its range and what it holds. The size is
bounded however many extents there are.

Pure: strings out. Labels come from guests and peers, so they are escaped here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from qmpblock.errors import printable
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.pictures.page import COLOURS, GREY, STYLE, xml
from qmpblock.pictures.strips import (
    DATA,
    RESERVED_ZERO,
    ZEROS,
    Strip,
    grid,
    guest_strip,
    layer_strip,
    zeros_strip,
)
from qmpblock.sizes import human_size

__all__ = ["MOST_RECTS", "svg_document", "svg_picture"]

#: How many marks a strip has at most.
MOST_RECTS = 1600

_ROW, _BAR, _LEFT, _TOP, _RIGHT = 22, 16, 220, 56, 16  # pixels
_LABEL = 30  # characters
_NARROWEST = 600  # pixels: room for the legend
_SHADES = ((1.0, 1.0), (0.5, 0.75), (0.125, 0.5), (0.0, 0.3))  # share of data, opacity

_Edges = npt.NDArray[np.int64]
_Look = tuple[str, int]  # how a cell is filled, and whose it is


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where an offset lies across the page."""

    start: int
    stop: int
    pixels: int

    def x(self, offset: int) -> float:
        return _LEFT + (offset - self.start) * self.pixels / max(1, self.stop - self.start)


def svg_picture(
    layers: Sequence[tuple[str, AllocationMap]],
    guest: AllocationMap,
    *,
    title: str = "",
    width: int = 1200,
) -> str:
    """Draw the implicit zeros, each layer, and what the guest sees.

    :param layers: name and own content of each, from the base to the active layer.
    :param guest: what the guest sees; the picture covers its range.
    :param title: above the picture.
    :param width: in pixels, at least 600.
    """
    width = max(width, _NARROWEST)
    start, stop, top = guest.start, guest.stop, len(layers) - 1
    strips = [zeros_strip(grid(start, stop, 1))]
    for i, (name, own) in enumerate(layers):
        edges = _detail(own, start, stop, width)
        strips.append(layer_strip(f"@{top - i} {name}", own, top - i, edges))
    strips.append(guest_strip("guest sees", guest, _detail(guest, start, stop, width)))
    count = f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"
    return svg_document(
        strips, title=title or f"{human_size(stop - start)} in {count}", width=width
    )


def svg_document(strips: Sequence[Strip], *, title: str, width: int = 1200) -> str:
    """Draw strips, each with edges of its own; the first spans the whole picture."""
    width = max(width, _NARROWEST)
    edges = strips[0].edges
    scale = _Scale(int(edges[0]), int(edges[-1]), width - _LEFT - _RIGHT)
    height = _TOP + len(strips) * _ROW + 40
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" version="1.1" {size}>',
        f"<title>{xml(title)}</title>",
        f'<style type="text/css">{STYLE}</style>',
        *_patterns(),
        f'<text class="h" x="8" y="20">{xml(title)}</text>',
        *_ruler(scale, height - 40),
    ]
    for i, strip in enumerate(strips):
        # A little air sets what the guest sees apart from what it is made of.
        lines += _row(strip, scale, _TOP + i * _ROW + (6 if strip.role == "guest" else 0))
    return "\n".join([*lines, *_legend(height - 14), "</svg>", ""])


def _detail(source: AllocationMap, start: int, stop: int, width: int) -> _Edges:
    """Return the edges to draw a map by: its own where they are few, else columns."""
    first, last = max(start, source.start), min(stop, source.stop)
    if first >= last:
        return grid(start, start, 1)
    window = source.clip(first, last - first).coalesce()
    if len(window) > MOST_RECTS:
        return grid(first, last, min(MOST_RECTS, width - _LEFT - _RIGHT))
    return np.append(window.offsets, np.int64(last))


def _row(strip: Strip, scale: _Scale, y: int) -> Iterator[str]:
    """Yield one strip: its label, a faint ground as long as its layer, its marks."""
    label = printable(strip.label)
    short = label if len(label) <= _LABEL else f"{label[: _LABEL // 2]}…{label[1 - _LABEL // 2 :]}"
    ground = max(0.0, scale.x(min(strip.end, scale.stop)) - _LEFT)
    yield f'<g><text x="8" y="{y + 12}">{xml(short)}<title>{xml(label)}</title></text>'
    yield (
        f'<rect x="{_LEFT}" y="{y}" width="{ground:.2f}" height="{_BAR}" '
        f'fill="{GREY}" fill-opacity="0.12"/>'
    )
    edges, kinds = strip.edges.tolist(), strip.kinds
    looks = list(map(_look, kinds.tolist(), strip.supplier.tolist()))
    sums = np.concatenate([np.zeros((1, 4), np.int64), kinds.cumsum(axis=0)])
    hairs = []  # drawn last: a wide neighbour must not cover them
    first = 0
    for look, run in groupby(looks):
        last = first + sum(1 for _ in run)
        if look is not None:
            held = (sums[last] - sums[first]).tolist()
            tip = f"{label}: {_tip(edges[first], edges[last], held, look[1], strip.role)}"
            x, right = scale.x(edges[first]), scale.x(edges[last])
            hair = right - x < 1
            x = min(x, _LEFT + scale.pixels - 1.0)
            mark = (
                f'<rect x="{x:.2f}" y="{y}" width="{max(1.0, right - x):.2f}" '
                f'height="{_BAR}" {look[0]}><title>{xml(tip)}</title></rect>'
            )
            if hair:
                hairs.append(mark)
            else:
                yield mark
        first = last
    yield from hairs
    yield "</g>"


def _look(kinds: Sequence[int], owner: int) -> _Look | None:
    """Return how a cell is filled and whose it is, or None where nothing is held."""
    name = str(owner % len(COLOURS)) if owner >= 0 else "n"
    if kinds[DATA]:
        share = kinds[DATA] / sum(kinds)
        opacity = next(opacity for least, opacity in _SHADES if share >= least)
        return f'fill="{COLOURS[owner % len(COLOURS)]}" fill-opacity="{opacity}"', owner
    if kinds[RESERVED_ZERO]:
        return f'fill="url(#r{name})"', owner
    if kinds[ZEROS]:
        return f'fill="url(#z{name})"', owner
    return None


def _tip(start: int, stop: int, held: Sequence[int], owner: int, role: str) -> str:
    """Say what a mark covers, exactly."""
    names = ("data", "zeros", "reserved zeros", "not held")
    shown = [(name, size) for name, size in zip(names, held, strict=True) if size]
    what = ", ".join(f"{human_size(size)} {name}" for name, size in shown)
    if len(shown) == 1:
        what = shown[0][0]
    source = f" from @{owner}" if role == "guest" and owner >= 0 else ""
    return f"{start} to {stop} ({human_size(stop - start)}): {what}{source}"


def _patterns() -> Iterator[str]:
    """Yield a hatch for zeros and a weave for reserved ones, of every colour."""
    yield "<defs>"
    for name, colour in [*((str(i), c) for i, c in enumerate(COLOURS)), ("n", GREY)]:
        ground = f'<rect width="6" height="6" fill="{colour}" fill-opacity="0.15"/>'
        up = f'<path d="M-1,1 l2,-2 M0,6 l6,-6 M5,7 l2,-2" stroke="{colour}"/>'
        down = f'<path d="M-1,5 l2,2 M0,0 l6,6 M5,-1 l2,2" stroke="{colour}"/>'
        for kind, strokes in (("z", up), ("r", up + down)):
            yield (
                f'<pattern id="{kind}{name}" width="6" height="6" '
                f'patternUnits="userSpaceOnUse">{ground}{strokes}</pattern>'
            )
    yield "</defs>"


def _ruler(scale: _Scale, bottom: int) -> Iterator[str]:
    """Yield the offsets at the quarters, with a line down through the strips."""
    for i in range(5):
        offset = scale.start + (scale.stop - scale.start) * i // 4
        x = scale.x(offset)
        anchor = ' style="text-anchor:end"' if i == 4 else ' class="v"'
        yield f'<text x="{x:.2f}" y="{_TOP - 10}"{anchor}>{human_size(offset)}</text>'
        yield (
            f'<path d="M{x:.2f},{_TOP - 6} V{bottom + 6}" stroke="{GREY}" stroke-opacity="0.35"/>'
        )


def _legend(y: int) -> Iterator[str]:
    marks = (
        (f'fill="{GREY}"', "data"),
        (f'fill="{GREY}" fill-opacity="0.5"', "some data"),
        ('fill="url(#zn)"', "zeros held"),
        ('fill="url(#rn)"', "zeros with host space"),
        (f'fill="{GREY}" fill-opacity="0.12"', "not held here"),
    )
    x = _LEFT
    for fill, words in marks:
        yield f'<rect x="{x}" y="{y - 11}" width="14" height="14" {fill}/>'
        yield f'<text x="{x + 20}" y="{y}">{words}</text>'
        x += 36 + 7 * len(words)
