"""Comparing two NBD exports byte for byte, in bounded memory.

Of what both servers say that it reads as zeros nothing is read; a hole and written zeros are equal.
Nothing but reads and questions is sent, so that an export under custody (K1) can be compared, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qmpblock.copying.meter import Meter
from qmpblock.copying.windows import Window, in_order, windows
from qmpblock.errors import RangeError
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.nbd import Client
    from qmpblock.qemu.job import Progress

__all__ = ["GRAIN", "Comparison", "compare", "find_unequal"]

GRAIN = 64 << 10
"""Bytes: unequal ranges begin and end at a multiple of it, a qcow2 cluster as a rule."""

_Bytes = bytes | bytearray
_MOST = 1 << 16  # unequal ranges that are kept apart


@dataclass(frozen=True)
class Comparison:
    """What comparing found. All in bytes, but `seconds`.

    :ivar first_difference: where the first byte is that differs; None where none does.
    :ivar differing: how many bytes differ, of those that were compared.
    :ivar unequal: where they are, in whole grains (`GRAIN`, or a coarser one where there are very
        many of them); nothing outside it differs.
    :ivar compared: how much was compared, from the first byte on.
    :ivar read: how much was read for it, of both together.
    """

    first_difference: int | None
    differing: int
    unequal: Ranges
    compared: int
    read: int
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether none differs."""
        return self.first_difference is None


async def compare(
    first: Client,
    second: Client,
    *,
    offset: int = 0,
    length: int | None = None,
    all: bool = False,  # noqa: A002 - the command's word
    progress: Callable[[Progress], None] | None = None,
    turn: Callable[[int], Awaitable[None]] | None = None,
) -> Comparison:
    """Compare two exports of the same size, or a range of two of any.

    What lies past the end of the shorter one reads as zeros, where the range reaches there.

    At most eight windows of 1 MiB are in flight of each. Cancelling stops at once; the clients
    stay usable.

    :param first: opened with the context `base:allocation`; without it, it is read whole.
    :param second: the same.
    :param offset: first byte to compare.
    :param length: in bytes; None: up to the end, which must be that of both.
    :param all: go on after the first difference, up to the end, and count them.
    :param progress: is told how far it is.
    :param turn: is awaited before so many bytes are read of either, or both.
    :raise RangeError: the sizes differ, and no length was given; or the
        range is not inside the longer one.
    :raise NBDError: a server failed, or a read.
    """
    began = time.monotonic()
    if length is None:
        if first.size != second.size:
            raise RangeError(
                f"one is of {first.size} bytes, the other of {second.size}: give the length of "
                "what is to be compared"
            )
        length = first.size - offset
    found = _Found(offset + length)
    meter = Meter("comparing", length, progress)
    compared = read = 0

    async def look(window: Window) -> bytes | None:
        await _wait_for(turn, window)
        return await _unequal(window, first, second)

    looks = in_order(windows((first, second), offset, length), look)
    async with aclosing(looks):
        async for window, mask in looks:
            compared += window.length
            read += sum(window.reads) * window.length
            meter.set(compared)
            if mask is not None:
                found.add(window.offset, mask)
                if not all:
                    break
    return Comparison(
        found.first, found.differing, found.ranges(), compared, read, time.monotonic() - began
    )


async def find_unequal(
    first: Client,
    second: Client,
    *,
    progress: Callable[[Progress], None] | None = None,
    turn: Callable[[int], Awaitable[None]] | None = None,
) -> Ranges:
    """Tell where two exports of the same size differ, as `Comparison.unequal` does, and no more.

    Which bytes they are is not looked at: where most differ, it takes a tenth of the processor
    time.

    :param first: as of `compare`; also `second`, and what is raised.
    """
    if first.size != second.size:
        raise RangeError(f"one is of {first.size} bytes, the other of {second.size}")
    found = _Found(first.size)
    meter = Meter("comparing", first.size, progress)

    async def look(window: Window) -> list[int]:
        await _wait_for(turn, window)
        one, other = await _both(window, first, second)
        at = range(0, len(one) if one != other else 0, GRAIN)
        return [
            (window.offset + start) // GRAIN
            for start in at
            if one[start : start + GRAIN] != other[start : start + GRAIN]
        ]

    async with aclosing(in_order(windows((first, second), 0, first.size), look)) as looks:
        async for window, grains in looks:
            found.note(grains)
            meter.set(window.offset + window.length)
    return found.ranges()


async def _wait_for(turn: Callable[[int], Awaitable[None]] | None, window: Window) -> None:
    if turn is not None and any(window.reads):
        await turn(window.length)


async def _both(window: Window, first: Client, second: Client) -> tuple[_Bytes, _Bytes]:
    """Read a window of both; nothing where neither has to be read."""
    reads = [
        client.read(window.offset, window.length)
        for client, wanted in zip((first, second), window.reads, strict=True)
        if wanted
    ]
    if not reads:
        return b"", b""
    data = await asyncio.gather(*reads)
    return (data[0], data[1]) if len(data) == 2 else (data[0], bytes(window.length))


async def _unequal(window: Window, first: Client, second: Client) -> bytes | None:
    """Return a byte for each of the window's that is not 0 where they differ; None: nowhere."""
    one, other = await _both(window, first, second)
    if one == other:
        return None
    mask = np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)
    return bytes(mask.view(np.uint8))


@dataclass
class _Found:
    """The differences that were found, in bounded memory."""

    stop: int
    first: int | None = None
    differing: int = 0
    _grain: int = GRAIN
    _spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, offset: int, mask: bytes) -> None:
        """Take the bytes that differ in a window; windows come in their order."""
        places = np.flatnonzero(np.frombuffer(mask, np.uint8)) + offset
        if self.first is None:
            self.first = int(places[0])
        self.differing += len(places)
        self.note(np.unique(places // GRAIN).tolist())

    def note(self, grains: Sequence[int]) -> None:
        """Take the numbers of grains that differ, ascending."""
        for grain in grains:
            start = grain * GRAIN // self._grain * self._grain
            self._append(start, start + self._grain)
        while len(self._spans) > _MOST:
            self._grain *= 2
            spans, self._spans = self._spans, []
            for start, stop in spans:
                self._append(
                    start // self._grain * self._grain, -(-stop // self._grain) * self._grain
                )

    def _append(self, start: int, stop: int) -> None:
        if self._spans and start <= self._spans[-1][1]:
            start, stop = self._spans[-1][0], max(stop, self._spans.pop()[1])
        self._spans.append((start, stop))

    def ranges(self) -> Ranges:
        return Ranges(self._spans).clip(0, self.stop)
