"""How long work is shown: a bar with rate and ETA on a terminal, plain lines off it; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.qemu.job import Progress

__all__ = ["Reporter", "reporting", "reporting_many", "text_line"]

_MOVING = ("copying", "comparing", "moving the memory")
_WORTH = 1024  # bytes a second of a guest that are worth a word
_EVERY = 5.0  # seconds between plain lines while only the numbers change


class Reporter(Protocol):
    """Takes what a job's iteration yields."""

    def __call__(self, seen: Progress) -> None:
        """Show it."""
        ...


@contextmanager
def reporting(what: str) -> Iterator[Reporter]:
    """Show the progress of `what`, such as `stream of vd0`."""
    with reporting_many() as begin:
        yield begin(what)


@contextmanager
def reporting_many() -> Iterator[Callable[[str], Reporter]]:
    """Show the progress of several things at once; what is yielded begins with one of them."""
    if sys.stderr.isatty():
        with _bars() as begin:
            yield begin
    else:
        yield _Lines


def text_line(what: str, seen: Progress) -> str:
    """Return one plain line.

    ``stream of vd0: copying, 12.5M of 64M, 20M/s, 3 s to go``
    """
    from qmpblock.sizes import human_size

    parts = [f"{printable(what)}: {seen.phase}"]
    if seen.ready:
        parts.append(f"{human_size(seen.remaining)} behind the guest")
    elif seen.phase != "ended":
        parts.append(f"{human_size(seen.done)} of {human_size(seen.total)}")
    if seen.phase in _MOVING and seen.rate:
        parts.append(f"{human_size(int(seen.rate))}/s")
    if seen.limit and seen.phase == "copying":
        parts.append(f"kept to {human_size(seen.limit)}/s")
        if seen.latency is not None:
            which = "99% of the guest's" if seen.measure == "p99" else "the guest's"
            parts.append(f"{which} requests take {seen.latency * 1e3:.1f} ms")
    if seen.written >= _WORTH and seen.phase in _MOVING:
        parts.append(f"{human_size(int(seen.written))}/s are written meanwhile")
    if seen.throttle:
        parts.append(f"the guest's CPUs are slowed down by {seen.throttle}%")
    if seen.eta is not None:
        parts.append(f"{seen.eta:.0f} s to go")
    if seen.downtime is not None:
        parts.append(f"the guest will stand for about {seen.downtime:.2g} s")
    if seen.stalled:
        parts.append(f"has not moved for {seen.idle:.0f} s")
    if seen.phase == "waiting for room":
        parts.append("no space left on the device; make room, and it goes on by itself")
    if seen.lagging:
        parts.append("the guest writes faster than it copies")
    return ", ".join(parts)


class _Lines:
    """Plain lines: at each change of phase, and every few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = ("", False)
        self._said = 0.0

    def __call__(self, seen: Progress) -> None:
        now = time.monotonic()
        kind = (seen.phase, seen.stalled)
        if kind != self._last or now - self._said >= _EVERY:
            self._last, self._said = kind, now
            click.echo(text_line(self._what, seen), err=True)


@contextmanager
def _bars() -> Iterator[Callable[[str], Reporter]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    from qmpblock.sizes import human_size

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[said]}", markup=False),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )

    def begin(what: str) -> Reporter:
        task = bars.add_task(printable(what), total=None, said="")

        def show(seen: Progress) -> None:
            done, total = seen.done, seen.total
            said = text_line("", seen).removeprefix(": ")
            if total:
                said = said.replace(f", {human_size(done)} of {human_size(total)}", "")
                said = f"{human_size(done)}/{human_size(total)}  {said}"
            bars.update(task, completed=done, total=max(total, 1), said=said)

        return show

    with bars:
        yield begin
