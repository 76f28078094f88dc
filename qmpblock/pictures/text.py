"""Pictures of maps as text, for a terminal.

It draws strips (`qmpblock.pictures.strips`) under each other: the implicit zeros, each layer's own
content down to the active one, then what the guest sees::

                    0        16M       32M       48M       64M
                    ├─────────┼─────────┼─────────┼─────────┤
    implicit zeros  00000000000000000000000000000000000000000
    @1 base.raw     ██████████·····█████░····················
    @0 top.qcow2    ··███·000│
    guest sees      ██████000······█████·····················
    from layer      1100011000.....11111.....................

A mark stands for everything in its cell, and nothing is too small to leave one: a single
cluster in a terabyte shows as a trace.

Pure: strings out. Labels come from guests and peers, so they are escaped here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from qmpblock.errors import printable
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.pictures.strips import DATA, RESERVED_ZERO, ZEROS, Strip, grid, layer_strips
from qmpblock.sizes import human_size

__all__ = ["ASCII", "UNICODE", "Glyphs", "strip_marks", "text_lines", "text_picture"]


# Text


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The marks of a text picture, one column wide each."""

    full: str  # all data
    most: str  # half or more of it
    some: str
    trace: str  # less than an eighth
    zeros: str  # all of it held as zeros
    some_zeros: str
    reserved: str  # all of it zeros that hold host space
    some_reserved: str
    absent: str
    end: str  # the layer ends here
    rule: str
    ticks: str  # first, middle, last
    ellipsis: str


UNICODE = Glyphs("█", "▓", "▒", "░", "0", "o", "R", "r", "·", "│", "─", "├┼┤", "…")
ASCII = Glyphs("#", "%", "+", ":", "0", "o", "R", "r", ".", "|", "-", "+++", "~")

# The nearest of 256 colours to those of `svg`, told apart by colour-blind readers.
_ANSI = (32, 214, 36, 175, 74, 166)
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_TAGS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FROM = "from layer"


def text_picture(
    layers: Sequence[tuple[str, AllocationMap]],
    guest: AllocationMap,
    *,
    width: int = 80,
    ascii: bool = False,  # noqa: A002  # what the option is called everywhere
    color: bool = False,
) -> str:
    """Draw the layers of a disk and what the guest sees, for a terminal.

    :param layers: name and own content of each, from the base to the active layer.
    :param guest: what the guest sees; the picture covers its range.
    :param width: of the terminal, in columns; at least 20 are used.
    :param ascii: use no character outside ASCII.
    :param color: mark the layers by ANSI colours too.
    """
    glyphs = ASCII if ascii else UNICODE
    top = len(layers) - 1
    names = [
        _label(_plain(name, glyphs), top - i, len(layers)) for i, (name, _) in enumerate(layers)
    ]
    room = max(map(_columns, [*names, "implicit zeros"]))
    width = max(width, 20)
    cells = width - min(room, max(width // 3, min(14, width // 2))) - 2
    edges = grid(guest.start, guest.stop, cells)
    labelled = [(name, own) for name, (_, own) in zip(names, layers, strict=True)]
    strips = layer_strips(labelled, guest, edges)
    return "\n".join(text_lines(strips, glyphs, width=width, color=color)) + "\n"


def text_lines(
    strips: Sequence[Strip],
    glyphs: Glyphs = UNICODE,
    *,
    width: int = 80,
    color: bool = False,
    legend: bool = True,
) -> list[str]:
    """Draw strips of the same edges: a ruler, a line each, the guest's suppliers, a legend.

    :param width: labels are shortened until the lines fit in it, but not below 1 column.
    """
    cells = len(strips[0].edges) - 1
    shown = [_plain(s.label, glyphs) for s in strips]
    room = max(1, min(max(map(_columns, [*shown, _FROM])), width - cells - 2))
    start, stop = int(strips[0].edges[0]), int(strips[0].edges[-1])

    def line(label: str, body: str) -> str:
        return f"{_fit(label, room, glyphs)}  {body}".rstrip()

    lines = [line("", body) for body in _ruler(start, stop, cells, glyphs)]
    used = ""
    for strip, label in zip(strips, shown, strict=True):
        marks = strip_marks(strip, glyphs)
        used += marks
        owner = strip.supplier.tolist()
        if strip.role == "layer":
            owner = [strip.depth] * cells
        lines.append(line(label, _coloured(marks, owner, glyphs) if color else marks))
        if strip.role == "guest" and strip.held.shape[1] > 1:
            tags = "".join(_tag(depth, glyphs) for depth in owner)
            lines.append(line(_FROM, _coloured(tags, owner, glyphs) if color else tags))
    return lines + (["", *_legend(used, width, glyphs)] if legend else [])


def strip_marks(strip: Strip, glyphs: Glyphs) -> str:
    """Return the mark of each cell of a strip.

    Data decides before zeros, zeros before nothing, and only a cell that is all of one
    kind gets the mark of a full one.
    """
    marks = []
    ended = False
    for start, stop, kinds in zip(
        strip.edges[:-1].tolist(), strip.edges[1:].tolist(), strip.kinds.tolist(), strict=True
    ):
        if start >= strip.end:
            marks.append(" " if ended else glyphs.end)
            ended = True
        else:
            marks.append(_mark(kinds, min(stop, strip.end) - start, glyphs))
    return "".join(marks)


def _mark(kinds: Sequence[int], size: int, glyphs: Glyphs) -> str:
    data, zeros, reserved = kinds[DATA], kinds[ZEROS], kinds[RESERVED_ZERO]
    if data:
        if data >= size:
            return glyphs.full
        return (
            glyphs.most if data * 2 >= size
            else glyphs.some if data * 8 >= size
            else glyphs.trace
        )  # fmt: skip
    if reserved:
        return glyphs.reserved if reserved >= size else glyphs.some_reserved
    if zeros:
        return glyphs.zeros if zeros >= size else glyphs.some_zeros
    return glyphs.absent


def _tag(depth: int, glyphs: Glyphs) -> str:
    if depth < 0:
        return glyphs.absent
    return _TAGS[depth] if depth < len(_TAGS) else "*"


def _label(name: str, depth: int, count: int) -> str:
    """Name a layer `@DEPTH name`, with the mark it goes by where that is not its depth."""
    digits = len(str(count - 1))
    tag = f" {_TAGS[depth]}" if 10 <= depth < len(_TAGS) else " *" if depth >= 10 else "  "
    return f"@{depth:<{digits}}{tag if count > 10 else ''} {name}"


def _coloured(text: str, owners: Sequence[int], glyphs: Glyphs) -> str:
    """Colour each mark by its layer, what no layer holds dimly; runs share one sequence."""

    def style(pair: tuple[str, int]) -> str:
        mark, depth = pair
        if depth < 0 or mark in (glyphs.absent, glyphs.end, " "):
            return _DIM
        return f"\x1b[38;5;{_ANSI[depth % len(_ANSI)]}m"

    runs = groupby(zip(text, owners, strict=True), style)
    return "".join(f"{code}{''.join(m for m, _ in run)}{_RESET}" for code, run in runs)


def _ruler(start: int, stop: int, cells: int, glyphs: Glyphs) -> list[str]:
    """Return two lines: offsets at the quarters as far as they fit, and the scale."""
    if cells < 2:
        return [human_size(start), glyphs.ticks[0]]
    parts = next((n for n in (4, 2, 1) if cells >= 8 * n), 1)
    scale = [glyphs.rule] * cells
    names = [" "] * (cells + 8)
    free = 0
    for i in range(parts + 1):
        at = min(cells * i // parts, cells - 1)
        scale[at] = glyphs.ticks[0 if i == 0 else 2 if i == parts else 1]
        name = human_size(start + (stop - start) * i // parts)
        # The last name ends where the scale does; the others start at their ticks.
        left = max(0, at - len(name) + 1) if i == parts else at
        if left >= free:
            names[left : left + len(name)] = name
            free = left + len(name) + 1
    return ["".join(names).rstrip(), "".join(scale)]


def _legend(used: str, width: int, glyphs: Glyphs) -> list[str]:
    """Explain the marks that were used, in as many lines as it takes."""
    words = (
        (glyphs.full, "data"),
        (glyphs.most, "mostly data"),
        (glyphs.some, "some data"),
        (glyphs.trace, "a trace of data"),
        (glyphs.zeros, "zeros"),
        (glyphs.some_zeros, "some zeros"),
        (glyphs.reserved, "reserved zeros"),
        (glyphs.some_reserved, "some reserved"),
        (glyphs.absent, "not held"),
        (glyphs.end, "the layer ends"),
    )
    lines: list[str] = []
    for mark, meaning in words:
        if mark not in used:
            continue
        entry = f"{mark} {meaning}"
        if lines and len(lines[-1]) + 3 + len(entry) <= width:
            lines[-1] += f"   {entry}"
        else:
            lines.append(entry)
    return lines


def _plain(label: str, glyphs: Glyphs) -> str:
    """Make a label safe to show, and ASCII where the marks are."""
    safe = printable(label)
    return safe.encode("ascii", "backslashreplace").decode() if glyphs is ASCII else safe


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _fit(label: str, room: int, glyphs: Glyphs) -> str:
    """Pad a label, or shorten it in its middle: names of layers differ at their ends."""
    if _columns(label) > room:
        head = _take(label, (room - 1) // 2)
        tail = _take(label[::-1], room - 1 - _columns(head))[::-1]
        label = head + glyphs.ellipsis + tail
    return label + " " * (room - _columns(label))


def _take(text: str, room: int) -> str:
    """Return as much of the start of a text as fits."""
    for i in range(len(text)):
        if _columns(text[: i + 1]) > room:
            return text[:i]
    return text
