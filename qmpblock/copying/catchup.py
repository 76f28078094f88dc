"""Catching up: what is there of a copy is brought near to its running disk, for a mirror to go on.

A mirror cannot be told to leave out what a target has: told to copy nothing but what is written
from now on (`sync: none`, F34), it wants a target that holds the rest. That is seen to first::

    record    a dirty bitmap of the disk's takes note of what the guest writes from here on
    compare   disk and target, both as they are: what differs is written to the target. What the
              guest writes meanwhile may be read or not, or half: it is in the bitmap
    again     another bitmap takes note, what is in the first is copied; and so on, until little is
              left, or what is left does not become smaller
    last      the VM is paused; what is left is copied; the mirror begins; the VM goes on

No guest is in the target's way: nothing reads the disk but an export, and nobody but us writes to
the target until the mirror does. In the pause nothing may be written, and it is seen that nothing
was: the bitmap that takes note of it is empty when the mirror has begun. Where the last step takes
longer than the guest may be held, the guest goes on at once, and it is tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qmpblock.cancellation import undisturbed
from qmpblock.copying.comparing import GRAIN
from qmpblock.copying.copytarget import Left
from qmpblock.copying.meter import DiskMeters, Meter
from qmpblock.copying.windows import CONTEXT, WINDOW, Window, in_order, windows
from qmpblock.copying.wiretarget import bounded
from qmpblock.errors import Error, NBDRequestError, StalledError, printable
from qmpblock.export.session import Request, exports
from qmpblock.names import paused_node, written_bitmaps
from qmpblock.qemu.instant import instant, resume
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.job import CopyJob
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection

__all__ = ["ATTEMPTS", "HOLD", "CatchUp"]

HOLD = 2.0
"""Seconds for which the guest may be held, while disks are brought to one instant, or handed on."""

ATTEMPTS = 3
"""At either."""

#: Of HOLD, in which what is left is to be copied at the rate of the last passes. Of many disks that
#: is low, for each pass of each takes some exports: no less is left than is written meanwhile.
_SHARE = 0.5
_LITTLE = 1 << 20  # bytes, with which it is not waited for less
_LONG = 8 << 20  # bytes of a range, in which it is asked first what reads as zeros
_MOST = 1 << 20  # ranges that are kept apart
_DIRTY = 1  # flag of a dirty bitmap's metadata context
_ZEROS = bytes(GRAIN)


@dataclass
class _Disk:
    """One disk and the target that is to catch up with it.

    :ivar node: of its active layer.
    :ivar names: of the bitmaps that take note in turn; the first does so now.
    :ivar left: what the target has not, as far as is known.
    :ivar copied: bytes that were written to the target.
    """

    target: CopyTarget
    node: str
    names: tuple[str, str]
    left: Ranges = field(default_factory=Ranges)
    copied: int = 0


@dataclass
class CatchUp:
    """What is left of several disks until mirrors can take over.

    :ivar run: in whose names it is.
    :ivar migrates_not: whether QEMU refuses to migrate meanwhile.
    :ivar held: seconds for which the VM was paused at most.
    """

    vm: Connection
    run: str
    targets: Sequence[CopyTarget]
    job: CopyJob
    migrates_not: bool = False
    held: float = 0.0
    _rate: float = 0.0  # bytes a second, of the last pass that tells
    _stands: bool = False  # the VM is paused by us

    async def hand_over(self, start: Callable[[], Awaitable[None]]) -> None:
        """Bring the targets up to date, and have `start` begin what keeps them so.

        Cancelling leaves bitmaps: whoever undoes the copy removes them. The guest goes on in any
        case.

        :raise StalledError: the guest writes faster than the targets take.
        :raise Error: what is left could not be copied in the time for which the guest may be held;
            or somebody else writes to a disk.
        """
        disks = [_disk_of(target) for target in self.targets]
        for disk in disks:
            await self._record(disk)
        await self._pass(disks, "comparing", first=True)
        missing = [disk.copied for disk in disks]
        for _ in range(ATTEMPTS):
            await self._come_near(disks)
            if await self._finish(disks, start):
                break
        else:
            raise Error(
                f"what is left of the copy could not be written within {HOLD:g} s, in {ATTEMPTS} "
                "attempts: some target takes it in too slowly. The guest went on each time",
                remedy="let the guest write less, or copy to faster storage; or copy one disk at "
                "a time",
            )
        for disk, lacked in zip(disks, missing, strict=True):
            disk.target.left = Left(lacked, disk.target.plan.size, disk.copied)
            for name in disk.names:
                await self._forget(disk, name)

    async def _come_near(self, disks: Sequence[_Disk]) -> None:
        """Copy what the guest wrote, and again, until there is little of it."""
        clock = asyncio.get_running_loop().time
        least, since = None, clock()
        while True:
            for disk in disks:
                await self._take_note(disk)
            left = sum(disk.left.total for disk in disks)
            smaller = least is None or left * 2 <= least
            if left <= _LITTLE or (not smaller and left <= self._rate * HOLD * _SHARE):
                return
            if least is None or left < least:
                least, since = left, clock()
            elif clock() - since > self.vm.stall:
                raise StalledError(
                    f"the copy does not catch up: the guest writes faster than it copies; {left} "
                    f"bytes are left, and have not become fewer for {self.vm.stall:g} s",
                    remedy="let the guest write less, raise --speed, or copy the start "
                    "(--at start)",
                )
            await self._pass(disks, "copying")

    async def _finish(self, disks: Sequence[_Disk], start: Callable[[], Awaitable[None]]) -> bool:
        """Copy what is left while no guest runs, and start what follows; False: no time."""
        began = time.monotonic()
        end = asyncio.get_running_loop().time() + HOLD
        try:
            with bounded(self.targets, HOLD):
                async with instant(self.vm, paused_node(self.run)) as self._stands:
                    try:
                        async with asyncio.timeout_at(end):
                            for disk in disks:
                                await self._take_note(disk)
                            await self._pass(disks, "copying", last=True)
                        await undisturbed(self._start(disks, start))
                    except BaseException:
                        await undisturbed(self._go_on())
                        raise
        except TimeoutError:
            return False
        finally:
            self._stands = False
            self.held = max(self.held, time.monotonic() - began)
        return True

    async def _start(self, disks: Sequence[_Disk], start: Callable[[], Awaitable[None]]) -> None:
        """Start what follows, with nothing written since all was copied.

        :raise Error: something was.
        """
        await start()
        counts = await self._counts()
        for disk in disks:
            if counts.get((disk.node, disk.names[0])) != 0:
                raise Error(
                    f"somebody writes to {disk.target.plan.device.name} while its VM is paused",
                    remedy="end whoever does (a writable export of the disk, say), and copy again",
                )

    @property
    def _patience(self) -> float | None:
        """Seconds for which a server is waited for: the VM must not stand for longer."""
        return HOLD if self._stands else None

    async def _go_on(self) -> None:
        """Have the VM go on, where it stands by our doing. Idempotent."""
        if self._stands:
            self._stands = False
            await resume(self.vm, paused_node(self.run))

    # -- what the guest writes

    async def _record(self, disk: _Disk) -> None:
        bitmap = {"node": disk.node, "name": disk.names[0], "granularity": GRAIN}
        await self.vm.monitor.execute("block-dirty-bitmap-add", bitmap)

    async def _forget(self, disk: _Disk, name: str) -> None:
        known = await self._counts()
        if (disk.node, name) in known:
            bitmap = {"node": disk.node, "name": name}
            await self.vm.monitor.execute("block-dirty-bitmap-remove", bitmap)

    async def _counts(self) -> dict[tuple[str, str], int]:
        """Return how many bytes each dirty bitmap of a node says were written."""
        nodes = await self.vm.monitor.execute("query-named-block-nodes", {"flat": True})
        return {
            (node["node-name"], one["name"]): one["count"]
            for node in nodes
            for one in node.get("dirty-bitmaps", ())
            if "name" in one
        }

    async def _take_note(self, disk: _Disk) -> None:
        """Add to what is left what was written since the last look; it is never not noted."""
        before, after = disk.names
        disk.names = after, before
        await self._record(disk)
        bitmap = {"node": disk.node, "name": before}
        await self.vm.monitor.execute("block-dirty-bitmap-disable", bitmap)
        request = Request(disk.node, (), bitmap=before)
        async with self._exporting(disk, [request]) as [client]:
            disk.left = disk.left.union(await _dirty(client, request.every_context[-1]))
        await self.vm.monitor.execute("block-dirty-bitmap-remove", bitmap)

    # -- copying

    async def _pass(
        self, disks: Sequence[_Disk], phase: str, *, first: bool = False, last: bool = False
    ) -> None:
        """Copy what is left; at first all is looked at."""
        amounts = {
            disk.target.plan.device.name: disk.target.plan.size if first else disk.left.total
            for disk in disks
        }
        meters = DiskMeters(phase, amounts, self.job)
        began = time.monotonic()
        for disk in disks:
            name = disk.target.plan.device.name
            if amounts[name]:
                await self._bring(disk, Meter(phase, amounts[name], meters.of(name)), first, last)
        copied, took = sum(amounts.values()), time.monotonic() - began
        if not first and copied >= _LITTLE and took > 0:
            self._rate = copied / took

    async def _bring(self, disk: _Disk, meter: Meter, first: bool, last: bool) -> None:
        target = disk.target
        requests = [Request(disk.node, (CONTEXT,)), Request(target.node, (CONTEXT,), writable=True)]
        try:
            async with self._exporting(disk, requests) as (here, there):

                async def bring(window: Window) -> int:
                    if any(window.reads) and not last:
                        await self.job.turn(window.length)
                    how = {"compares": first, "no_hole": target.plan.shape.allocation == "full"}
                    return await _bring(window, here, there, **how)

                every = None if first else disk.left
                looks, done = in_order(_places(here, there, every), bring), 0
                async with aclosing(looks):
                    async for window, copied in looks:
                        disk.copied += copied
                        done += window.length
                        meter.set(done)
                if not last:  # pausing the VM flushes all, and the guest would wait for that
                    await there.flush()
                    await here.flush()
        except NBDRequestError as error:
            error.message = (
                f"what is there cannot be brought up to date with its disk: {error.message}"
            )
            error.remedy = (
                f"look at the storage of the disk and of {printable(target.path)}, and whether "
                "there is room; then go on once more, with --resume"
            )
            raise
        disk.left = Ranges()

    @asynccontextmanager
    async def _exporting(
        self, disk: _Disk, requests: Sequence[Request]
    ) -> AsyncIterator[list[Client]]:
        """Yield clients; no server is waited for at either end, and no guest is meanwhile."""
        async with AsyncExitStack() as stack:
            with bounded([disk.target], self._patience):
                clients = await stack.enter_async_context(
                    exports(
                        *(self.vm.monitor, disk.target.plan.device, requests),
                        access=self.vm.nbd,
                        stall=self.vm.stall,
                        held=self.migrates_not,
                    )
                )
            try:
                yield clients
            except BaseException as error:
                await undisturbed(self._go_on())  # ending the exports waits for what was asked
                if not isinstance(error, asyncio.CancelledError):
                    disk.target.cut()
                raise
            finally:
                with bounded([disk.target], self._patience):
                    await stack.aclose()


def _disk_of(target: CopyTarget) -> _Disk:
    active = target.plan.device.chain.active.node.name
    return _Disk(target, active, written_bitmaps(target.node))


async def _dirty(client: Client, context: str) -> Ranges:
    """Return what a dirty bitmap says."""
    at, starts, stops = 0, [], []
    while at < client.size:
        extents = (await client.block_status(at, min(client.size - at, client.max_status_length)))[
            context
        ]
        ends = np.cumsum(extents[:, 0].astype(np.int64)) + at
        dirty = (extents[:, 1] & np.uint64(_DIRTY)) != 0
        starts.append(np.concatenate(([at], ends[:-1]))[dirty])
        stops.append(ends[dirty])
        at = int(ends[-1])
    found, grain = Ranges.from_arrays(np.concatenate(starts), np.concatenate(stops)), GRAIN
    while len(found) > _MOST:
        grain *= 2
        found = found.align_out(grain, client.size)
    return found.clip(0, client.size)


async def _places(here: Client, there: Client, ranges: Ranges | None) -> AsyncIterator[Window]:
    """Yield the windows of ranges; None: of all."""
    for start, stop in ((0, here.size),) if ranges is None else ranges:
        if ranges is None or stop - start >= _LONG:
            async for window in windows((here, there), start, stop - start):
                yield window
        else:
            for window in _plain(start, stop):
                yield window


def _plain(start: int, stop: int) -> Iterator[Window]:
    for at in range(start, stop, WINDOW):
        yield Window(at, min(WINDOW, stop - at), (True, True))


async def _bring(
    window: Window, here: Client, there: Client, *, compares: bool, no_hole: bool
) -> int:
    """Have a target hold what its disk holds in a window; return how many bytes were written.

    :param compares: whether what it holds already is not written again.
    :param no_hole: whether zeros keep their host space.
    """
    if not any(window.reads):
        return 0  # zeros, both
    reads_here, reads_there = window.reads
    at, length = window.offset, window.length
    reading = [here.read(at, length)] if reads_here else []
    if compares and reads_there:
        reading.append(there.read(at, length))
    data = await asyncio.gather(*reading)
    wanted = data[0] if reads_here else bytes(length)
    is_there = (data[-1] if reads_there else bytes(length)) if compares else None
    written = 0
    for start, stop, zero in _spans(wanted, is_there):
        if zero:
            await there.write_zeroes(at + start, stop - start, no_hole=no_hole)
        else:
            await there.write(at + start, memoryview(wanted)[start:stop])
        written += stop - start
    return written


def _spans(
    wanted: bytes | bytearray, is_there: bytes | bytearray | None
) -> Iterator[tuple[int, int, bool]]:
    """Yield what has to be written, in whole grains: from where to where, and whether it is zeros.

    :param is_there: what is there instead; None: that does not matter. Pure.
    """
    start, kind = 0, None
    for at in range(0, len(wanted), GRAIN):
        piece = wanted[at : at + GRAIN]
        same = is_there is not None and piece == is_there[at : at + GRAIN]
        this = None if same else piece == _ZEROS[: len(piece)]
        if this is not kind:
            if kind is not None:
                yield start, at, kind
            start, kind = at, this
    if kind is not None:
        yield start, len(wanted), kind
