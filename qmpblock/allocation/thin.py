"""Thin allocation: what lies below a range comes into the active layer.

By NBD_CMD_CACHE on a read-only export of the active node, for which QEMU copies the range up by
itself, serialised with the guest's writes (F2). What came of it is read back from the map,
through the same export.

An `Allocator` keeps what that takes, for many ranges one after another::

    entering                                  for each range
    1. the disk's lock, its chain             1. its map, as it is now
    2. the export, connected                  2. requests for what is below, and the map again
    3. is it of the active layer?             3. is it still? (5 times a second, and when the
                                                 last range is done)

The chain may be changed by others meanwhile. A layer that they drop from below is no matter. An
overlay that they put on top is: the export follows it, silently (F6), and so would the
requests. They change no content there either, but it is not what was asked. One that came before
the export was made leaves that on a layer which nobody writes to any more, and QEMU aborts where it
is to copy something up into one (K43). So it is looked at once the export is there, from when on it
follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from qmpblock.allocation.plan import Batch, below, requests, rounded
from qmpblock.cancellation import task_group, undisturbed
from qmpblock.changes.change import Change
from qmpblock.changes.identity import identify
from qmpblock.changes.leftovers import make_way
from qmpblock.changes.nodes import check_copy_on_read
from qmpblock.changes.operations import ThinAllocation
from qmpblock.errors import UNTOUCHED, CommandError, GraphError, NBDError, UnsupportedError
from qmpblock.graph.writable import check_disk
from qmpblock.host.imagefiles import image_files
from qmpblock.mapping import check_active, exported_active, other_active, read_map
from qmpblock.names import lock_names, new_run
from qmpblock.qemu import ownership
from qmpblock.qemu.job import Progress
from qmpblock.ranges import Ranges
from qmpblock.sizes import check_range
from qmpblock.speed import RateMeter, Speed

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.mapping import MappedDisk
    from qmpblock.nbd import Client

__all__ = ["AllocationResult", "Allocator", "Report", "allocator", "check_thin", "open_allocator"]

_ATTEMPTS = 4  # at what the guest discards again meanwhile
# Bytes of data in one request. QEMU takes a new buffer for each, which costs more the larger it
# is: at 256 KiB half the time of 4 MiB (7.2 and 11.1).
_REQUEST = 256 << 10
_ZEROS = 4 << 20
# QEMU works on 16 of one client at once; the others wait for it, and not it for us.
_IN_FLIGHT = 64
_LOOK = 0.2  # seconds between looks at where the export is
# Their CACHE is known to do nothing over a backing image (F10).
_USELESS = frozenset({"parallels", "raw", "vdi", "vhdx", "vpc"})


@dataclass(frozen=True)
class AllocationResult:
    """What an allocation did. All in bytes.

    :ivar offset: as asked; also `length`.
    :ivar rounded_offset: outwards to whole clusters of the active layer; also `rounded_length`.
    :ivar allocated: came from layers below into the active layer: data and explicit zeros.
    :ivar reserved: got host space, which no layer had, or only as zeros.
    :ivar already: of the rounded range, stood in the active layer before.
    :ivar held: the longest time, in seconds, for which the guest's I/O was held.
    :ivar warnings: what is worth acting on.
    """

    disk: str
    offset: int
    length: int
    rounded_offset: int
    rounded_length: int
    allocated: int = 0
    reserved: int = 0
    already: int = 0
    held: float = 0.0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def check_thin(disk: MappedDisk) -> None:
    """Refuse an active layer into which nothing can be brought from below.

    :raise UnsupportedError: its format, or this QEMU with it.
    """
    active = disk.chain.active
    if active.format in _USELESS:
        raise UnsupportedError(
            f"a range of a {active.format} image cannot be allocated from its backing image: QEMU "
            "does not do it for that format",
            standing=UNTOUCHED,
        )
    check_copy_on_read(disk.vm.capabilities, active)


class Allocator:
    """Brings ranges of one disk into its active layer. Made by `Disk.allocator`.

    Several calls may be under way at once.
    """

    def __init__(self, disk: MappedDisk, client: Client) -> None:
        self._disk = disk
        self._client = client
        self._active = disk.chain.active
        self._looked = time.monotonic()
        self._unseen = False  # whether it is to be seen where what was asked for went

    async def allocate(self, offset: int = 0, length: int | None = None) -> AllocationResult:
        """Make a range stand in the active layer, its content unchanged.

        As `Disk.allocate`, thin. Cancelled, or failed, what was done by then stays, and so does
        the allocator.

        :param offset: in bytes; rounded outwards to clusters, as is the end.
        :param length: in bytes; by default up to the disk's end.
        :raise RangeError: the range is not inside the disk.
        :raise UnsupportedError: the guest discards it as fast as it comes up, or QEMU does not do
            it for this format.
        :raise GraphError: the active layer is another one now: somebody took a snapshot.
        :raise NBDError: the export, or QEMU, has gone.
        """
        started = time.monotonic()
        size = self._client.size
        offset, length = check_range(size, offset, length)
        first, count = rounded(offset, length, self._active.node.cluster_size or 512, size)
        result = AllocationResult(self._disk.name, offset, length, first, count)
        if count:
            where = Ranges([(first, first + count)])
            async with self._unless_moved():
                done, already = await self._bring_up(where, Speed(), None)
            result = replace(result, allocated=done, already=already)
        return replace(result, seconds=time.monotonic() - started)

    async def allocate_ranges(
        self,
        where: Ranges,
        *,
        speed: Speed | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> tuple[int, int]:
        """Bring ranges up, many requests in flight; return bytes done, and there before.

        :param where: whole clusters, at least one.
        :raise Error: as `allocate`.
        """
        async with self._unless_moved():
            done = await self._bring_up(where, speed or Speed(), progress)
            await self.verify()
        return done

    @property
    def unseen(self) -> bool:
        """Whether something was brought up since it was last seen where that goes."""
        return self._unseen

    async def verify(self) -> None:
        """See that what was brought up by now went into the active layer, if that is not known.

        :raise GraphError: that is another one: an export follows it silently.
        """
        await self._disk.refresh()
        check_active(self._disk, self._active)
        self._unseen = False

    async def _bring_up(
        self, where: Ranges, speed: Speed, progress: Callable[[Progress], None] | None
    ) -> tuple[int, int]:
        """Copy up until nothing of the ranges is below.

        The maps before and after, and the requests between, all go through one export.
        """
        first = int(where.starts[0])
        span = first, int(where.stops[-1]) - first
        await self._look()
        seen = await self._map(*span)
        left = total = (below(seen) & where).total
        already = (seen.where(depth=0, present=True) & where).total
        for _ in range(_ATTEMPTS):
            if not left:
                return total, already
            report = Report(total, total - left, progress)
            self._unseen = True
            await self._cache(self._batches(seen, where, speed), speed, report)
            seen = await self._map(*span)
            before, left = left, (below(seen) & where).total
            if 0 < before <= left:
                break
        if not left:
            return total, already
        raise UnsupportedError(
            f"{left} bytes of {self._disk.name} are still below the active layer: "
            f"{self._active.format} does not take them, or the guest discards them as fast as "
            "they are allocated",
        )

    async def _map(self, offset: int, length: int) -> AllocationMap:
        """Map a range; what is below it is all that matters of the depths.

        They count from the active layer, so that it is told right whatever others do to the
        layers under it. If there are more than there were, the chain is looked at again.
        """
        for _ in range(_ATTEMPTS):
            try:
                return await read_map(self._client, self._disk.chain, offset, length)
            except NBDError:
                chain = self._disk.chain
                await self.verify()
                if self._disk.chain.shape == chain.shape:
                    raise
        raise GraphError(f"the chain of {self._disk.name} changed during each of {_ATTEMPTS} maps")

    def _batches(self, seen: AllocationMap, where: Ranges, speed: Speed) -> Iterable[Batch]:
        most = self._client.max_cache_length
        limits = [speed.piece(min(most, length)) for length in (_REQUEST, _ZEROS)]
        # A cluster of QED may be larger than a request; QEMU rounds that up by itself.
        unit = min(self._active.node.cluster_size or 512, most)
        return requests(seen, unit, self._client.size, *limits, where=where)

    async def _cache(self, batches: Iterable[Batch], speed: Speed, report: Report) -> None:
        """Send the requests, some in flight, as fast as `speed` allows."""
        left = iter(batches)
        turn = asyncio.Lock()  # under a limit, one at a time

        async def work(some: Iterable[Batch]) -> None:
            for batch in some:
                await self._look()
                async with turn if speed.rate else nullcontext():
                    await speed.wait(batch.length)
                    await self._client.cache(batch.start, batch.length)
                report.add(batch.length)

        head = list(islice(left, 2))
        if len(head) == 1:  # no need of tasks
            await work(head)
            return
        left = chain(head, left)
        async with task_group() as group:
            for _ in range(_IN_FLIGHT):
                group.create_task(work(left))

    async def _look(self) -> None:
        """See now and then that the export is still of the active layer.

        :raise GraphError: a foreign snapshot has redirected it, silently.
        """
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        monitor = self._disk.vm.monitor
        await ownership.ask(monitor, standing=None)  # where QEMU is not held from migrating
        for export in await monitor.execute("query-block-exports"):
            if (
                export["id"] == self._client.export
                and export["node-name"] != self._active.node.name
            ):
                raise other_active(self._disk.name)

    @asynccontextmanager
    async def _unless_moved(self) -> AsyncIterator[None]:
        """Where the body fails because the active layer is another one, say that instead."""
        try:
            yield
        except (CommandError, NBDError):
            disk = self._disk
            await ownership.ask(disk.vm.monitor, [disk.device], standing=None)
            await self.verify()
            raise


@asynccontextmanager
async def open_allocator(disk: MappedDisk) -> AsyncIterator[Allocator]:
    """Keep what thin allocation of a disk takes, once others made way. See `Disk.allocator`."""
    await ownership.ask(disk.vm.monitor, [disk.device])
    await make_way(disk.vm, lock_names([disk.device]))
    await disk.refresh()
    check_disk(disk.device)
    async with allocator(disk) as opened:
        yield opened


@asynccontextmanager
async def allocator(disk: MappedDisk) -> AsyncIterator[Allocator]:
    """Keep what thin allocation of a disk takes, as it was seen last."""
    if len(disk.chain.layers) > 1:
        check_thin(disk)
    record = ThinAllocation(
        run=new_run(),
        vm=await identify(disk.vm),
        devices=(disk.device.qom_path,),
        names=(disk.name,),
        locks=lock_names([disk.device]),
        images=image_files(disk.vm.monitor.peer_pid, disk.chain),
    )
    # Without a journal: nothing that it makes outlives QEMU, and the locks say what is there.
    change = Change(disk.vm, record, journaled=False)
    await change.begin()
    async with change.or_undo(
        lambda: (
            "what was allocated by then stays: its content is the same. Nothing of ours is left "
            "in the VM"
        )
    ):
        async with exported_active(disk, in_flight=_IN_FLIGHT, held=change.held) as client:
            made = Allocator(disk, client)
            yield made
            if made.unseen:
                await made.verify()
        await undisturbed(change.end())


class Report:
    """Adds up what is done and tells it."""

    def __init__(
        self,
        total: int,
        done: int,
        progress: Callable[[Progress], None] | None,
        phase: str = "allocating",
    ) -> None:
        self._total = total
        self._done = done
        self._tell = progress
        self._phase = phase
        self._meter = RateMeter()

    def add(self, length: int) -> None:
        """Count `length` bytes as done."""
        self.set(min(self._total, self._done + length), self._total)

    def set(self, done: int, total: int) -> None:
        """Say how far it is."""
        self._done, self._total = done, total
        if self._tell is None:
            return
        self._meter.add(time.monotonic(), self._done)
        rate = self._meter.rate
        eta = (self._total - self._done) / rate if rate > 0 else None
        self._tell(Progress("running", self._phase, self._done, self._total, rate, eta))
