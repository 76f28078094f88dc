"""What a migration came to, as a timeline."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from qmpblock.errors import printable
from qmpblock.pictures.timeline import Bar, Row, Timeline, duration
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.migration.job import MigrationResult, PhaseTime

__all__ = ["timeline_of"]

_LARGE = ("memory", "held", "ended", "sent", "landed", "handed")  # the guest stands in them
_WHAT = {
    "checked": "locks taken, the destination made ready",
    "mirroring": "disks are copied",
    "ready": "every disk is as far as the guest",
    "memory": "the memory is sent",
    "held": "the mirrors end",
    "ended": "the exports end",
    "sent": "the rest is sent",
    "landed": "the arbiter decides",
    "handed": "the guest goes on, and all is cleaned up",
}
_STANDING = {**_WHAT, "memory": "QEMU flushes the disks", "handed": "the guest goes on"}
_PAUSED = {**_STANDING, "memory": "it is paused, and the memory is sent"}


def timeline_of(result: MigrationResult) -> Timeline:
    """Return it. Pure."""
    starts = [0.0, *accumulate(one.seconds for one in result.phases)]
    bars = {
        one.phase: Bar(start, start + one.seconds, _said(one))
        for one, start in zip(result.phases, starts, strict=False)
    }
    moment = None
    if result.stopped is not None and result.resumed is not None:
        moment = result.stopped, result.resumed
    rows = []
    for one in result.phases:
        if moment is not None and one.phase in _LARGE[1:]:
            continue  # hairs: they are drawn large
        rows.append(Row(one.phase, (bars[one.phase],), _said(one), 0))
        if one.phase == "mirroring":
            rows += _disks(result)
        elif one.phase == "memory" and result.passes:
            rows.append(_passes(result))
    within: tuple[Row, ...] = ()
    if moment is not None:
        words = _PAUSED if result.paused else _STANDING
        shown = bars if result.paused else _LARGE
        within = tuple(
            Row(name, (_cut(bar, *moment),), _inside(bar, *moment, words[name]), 5)
            for name, bar in bars.items()
            if name in shown and bar.stop > moment[0] and bar.start < moment[1]
        )
    stood = f"the guest stood for {duration(result.longest_stall)}"
    if result.resumed is None and result.destination != "running":
        stood = f"the guest stays {printable(result.destination)}, as it had stopped"
    return Timeline(
        f"migration: {duration(result.seconds)}, {stood}",
        result.seconds,
        tuple(rows),
        moment,
        f"the guest stands: {duration(result.longest_stall)}",
        within,
    )


def _said(one: PhaseTime) -> str:
    moved = f", {human_size(one.bytes)}, {_rate(one.rate)}" if one.bytes else ""
    return f"{duration(one.seconds)}{moved}: {_WHAT.get(one.phase, '')}"


def _disks(result: MigrationResult) -> list[Row]:
    rows = []
    for number, disk in enumerate(result.disks):
        course = disk.course
        if not course.moments:
            continue
        last = course.moments[-1][0]
        ready = course.began + course.seconds
        said = f"{human_size(disk.copied)}, {_rate(course.rate)}"
        rows.append(
            Row(
                disk.disk,
                (
                    Bar(course.began, ready, f"{duration(course.seconds)}, {said}"),
                    Bar(ready, max(ready, last), "it follows the guest"),
                ),
                said,
                1 + number % 4,
                course.moments,
            )
        )
    return rows


def _passes(result: MigrationResult) -> Row:
    bars = tuple(
        Bar(
            one.began,
            one.began + one.seconds,
            f"pass {one.number}, {duration(one.seconds)}: {human_size(one.sent)} sent, "
            f"{_rate(one.rate)}; {human_size(one.left)} to be sent at its beginning",
        )
        for one in result.passes
    )
    count = len(bars)
    said = f"{count} pass{'es' if count != 1 else ''}, {human_size(result.transferred)}"
    return Row("passes", bars, said, 4)


def _cut(bar: Bar, start: float, stop: float) -> Bar:
    air = (stop - start) * 0.12
    return Bar(max(bar.start, start - air), min(bar.stop, stop + air), bar.words)


def _inside(bar: Bar, start: float, stop: float, what: str) -> str:
    took = min(bar.stop, stop) - max(bar.start, start)
    return f"{duration(max(0.0, took))}: {what}"


def _rate(speed: float) -> str:
    return f"{human_size(round(speed))}/s"
