"""What of one or several NBD exports has to be read to know their contents, a window at a time.

A window is read whole, or not at all where the server says that it reads as zeros. So however
finely a guest has its disk fragmented, there is at most one read a window, and as much memory as
the windows in flight.

::

    first      |dddd....|........|........|dddddddd|
    second     |dddddddd|........|...dd...|dddddddd|
    to read    | both   |  none  | second |  both  |
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qmpblock.errors import RequestError
from qmpblock.sizes import check_range

if TYPE_CHECKING:
    import numpy.typing as npt

    from qmpblock.nbd import Client

__all__ = ["CONTEXT", "IN_FLIGHT", "WINDOW", "ZERO", "Window", "in_order", "windows"]

_T = TypeVar("_T")

CONTEXT = "base:allocation"
"""The metadata context by which zeros are known; an export without it is read whole."""

ZERO = 2
"""The flag of that context by which something reads as zeros."""

WINDOW = 1 << 20
"""Bytes that are read at a time, as a rule."""

IN_FLIGHT = 8
"""Windows that are read at once: enough to hide the round trip."""

_FAR = 1 << 63  # bytes: past the end of any
_SPAN = 1 << 30  # bytes that a server is asked about at a time


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the exports, in bytes.

    :ivar reads: of each export, whether it has to be read here; else it reads as zeros. Where none
        has to be, the window may be of any length.
    """

    offset: int
    length: int
    reads: tuple[bool, ...]


async def windows(
    clients: Sequence[Client], offset: int, length: int, size: int = WINDOW
) -> AsyncIterator[Window]:
    """Yield the windows of a range, in their order and without gaps.

    :param offset: first byte.
    :param length: in bytes; what lies past the end of an export reads as zeros there.
    :param size: of a window, in bytes; each ends at a multiple of it, or at the end
        of an export or of the range.
    :raise RangeError: the range is not inside the largest of them.
    :raise NBDError: a server failed.
    """
    if size < 1:
        raise RequestError(f"a window of {size} bytes")
    check_range(max(client.size for client in clients), offset, length)
    cursors = [_Zeros(client) for client in clients]
    stop = offset + length
    while offset < stop:
        ends = [client.size for client in clients if client.size > offset]
        end = min(offset - offset % size + size, stop, *ends)
        zeros = [await cursor.until(offset, end) for cursor in cursors]
        reads = tuple(zero < end for zero in zeros)
        if not any(reads):  # on to the last boundary that all of them reach
            end = max(end, min(min(zeros) // size * size, stop, *ends))
        yield Window(offset, end - offset, reads)
        offset = end


async def in_order(
    parts: AsyncIterator[Window],
    work: Callable[[Window], Coroutine[Any, Any, _T]],
    most: int = IN_FLIGHT,
) -> AsyncGenerator[tuple[Window, _T], None]:
    """Work on several windows at once, and yield what comes of each, in their order.

    To be closed (`contextlib.aclosing`): that cancels what is under way, and waits for it.

    :param most: windows that are worked on at once.
    """
    running: deque[tuple[Window, asyncio.Task[_T]]] = deque()
    try:
        async for window in parts:
            running.append((window, asyncio.ensure_future(work(window))))
            while len(running) >= most:
                yield running[0][0], await running[0][1]
                running.popleft()
        while running:
            yield running[0][0], await running[0][1]
            running.popleft()
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)


class _Zeros:
    """Where an export reads as zeros, by its server's word; looked at from front to back."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known = CONTEXT in client.contexts
        self._stops: npt.NDArray[np.int64] = np.empty(0, np.int64)  # of runs of either kind
        self._zero: npt.NDArray[np.bool_] = np.empty(0, np.bool_)

    async def until(self, offset: int, end: int) -> int:
        """Return where the zeros that begin at `offset` end; `offset` where there are none.

        :param end: how far it matters; they may go on past what is returned, if that is not less.
        """
        if offset >= self._client.size:
            return _FAR
        at = offset
        while self._known and at < self._client.size:
            if not len(self._stops) or at >= self._stops[-1]:
                if at >= end:
                    break
                await self._ask(at)
            run = int(np.searchsorted(self._stops, at, side="right"))
            if not self._zero[run]:
                break
            at = int(self._stops[run])
        return at

    async def _ask(self, at: int) -> None:
        """Ask what is at a place, and what follows."""
        client = self._client
        length = min(client.size - at, client.max_status_length, _SPAN)
        extents = (await client.block_status(at, length))[CONTEXT]
        zero = (extents[:, 1] & np.uint64(ZERO)) != 0
        last = np.append(zero[1:] != zero[:-1], True)  # of each run
        stops = np.cumsum(extents[:, 0].astype(np.int64)) + at
        self._stops, self._zero = stops[last], zero[last]
