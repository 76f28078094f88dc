"""Allocate: make a range of a running disk stand in its active layer, contents unchanged.

*Thin*: what some layer below holds comes into the active layer; what no layer holds stays
blank. By NBD_CMD_CACHE on a read-only export of the active node, for which QEMU copies the
range up by itself, serialised with the guest's writes: no data crosses the socket, nothing is
paused, and no write can be lost (facts 0.B). What came of it is read back from the map.

*Full*: what no layer holds, and mere zeros, get host space too (`qmpblock.reserving`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock import hostfiles, ownership
from qmpblock.cancellation import undisturbed
from qmpblock.chainjobs import host_files
from qmpblock.change import Change, identify, lock_names, make_way
from qmpblock.disk import check_range, exported, read_map
from qmpblock.driving import check_copy_on_read
from qmpblock.errors import (
    CommandError,
    GraphError,
    NBDError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.job import Progress
from qmpblock.journal import Record
from qmpblock.managers import Work
from qmpblock.pace import RateMeter, Speed
from qmpblock.planning import Batch, below, dataless, growth_warning, requests, rounded
from qmpblock.ranges import Ranges
from qmpblock.reserving import blank_ranges, raw_file, reserve_ranges
from qmpblock.staging import check_staged, check_staging, reserve_by_staging
from qmpblock.writable import check_disk

if TYPE_CHECKING:
    from qmpblock.disk import Disk
    from qmpblock.extents import AllocationMap
    from qmpblock.graph import Layer
    from qmpblock.nbd import Client

__all__ = ["AllocationResult", "allocate", "allocate_ranges", "check_thin"]

_ATTEMPTS = 4  # at what the guest discards again meanwhile
# Bytes of data in one request. QEMU takes a new buffer for each, which costs more the larger it
# is: at 256 KiB half the time of 4 MiB (7.2 and 11.1).
_REQUEST = 256 << 10
_ZEROS = 4 << 20
# QEMU works on 16 of one client at once; the others wait for it, and not it for us.
_IN_FLIGHT = 64
_LOOK = 0.2  # seconds between looks at where the export is
# Their CACHE is known to do nothing over a backing image (facts 13).
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


async def allocate(
    disk: Disk,
    offset: int = 0,
    length: int | None = None,
    *,
    full: bool = False,
    independent: bool = False,
    speed: Speed | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> AllocationResult:
    """Make a range stand in the active layer. See `Disk.allocate`."""
    started = time.monotonic()
    await ownership.ask(disk.vm.monitor, [disk.device])
    await make_way(disk.vm, lock_names([disk.device]))
    await disk.refresh()
    active = disk.chain.active
    if independent and len(disk.chain.layers) > 1:
        await ownership.ask_for_change(disk.vm, Work("independent", active.file))
    offset, length = check_range(disk.size, offset, length)
    cluster = active.node.cluster_size or 512
    first, count = rounded(offset, length, cluster, disk.size)
    if independent and (first, count) != (0, disk.size):
        raise RequestError(
            "to be independent of its backing images a disk must be allocated whole",
            standing="nothing was touched",
            remedy="leave --offset and --length out",
        )
    where = Ranges([(first, first + count)])
    done = await allocate_ranges(disk, where, full=full, speed=speed, progress=progress, warn=warn)
    result = replace(done, offset=offset, length=length, rounded_offset=first, rounded_length=count)
    if independent and len(disk.chain.layers) > 1:
        async with disk.stream() as job:
            async for seen in job:
                if progress is not None:
                    progress(seen)
        if warn is not None:
            for text in job.warnings:
                warn(text)
        result = replace(result, warnings=(*result.warnings, *job.warnings))
    return replace(result, seconds=time.monotonic() - started)


async def allocate_ranges(
    disk: Disk,
    where: Ranges,
    *,
    full: bool = False,
    speed: Speed | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> AllocationResult:
    """Make ranges stand in the active layer: as many as there are take no more than one does.

    Returns what was done, offset and length being those of the span from the first to the last.

    :param where: whole clusters of the active layer, inside the disk.
    """
    started = time.monotonic()
    check_disk(disk.device)
    span = _span(where) if where else (0, 0)
    found = AllocationResult(disk.name, *span, *span)
    raw = await raw_file(disk) if full else None
    if full and raw is None:
        await check_staged(disk)
        await ownership.ask_for_change(disk.vm, Work("reserve", disk.chain.active.file))
    if not where:
        return found
    speed = speed or Speed()
    staged = full and raw is None
    said = _Said(warn)
    growing = await _tell_growth(disk, where, said) if staged else {}
    if len(disk.chain.layers) > 1:
        allocated, already = await _allocate_thin(disk, where, speed, progress)
        found = replace(found, allocated=allocated, already=already)
        if growing:  # data that came up and turned out to be zeros will be reserved, too
            growing = await _tell_growth(disk, where, said, growing)
    if full:
        meter = _Report(0, 0, progress, "reserving")
        if raw is not None:
            file, begin = raw
            await ownership.ask(disk.vm.monitor, [disk.device], standing=None)
            in_file = [(begin + start, begin + stop) for start, stop in where]
            done = await reserve_ranges(file, in_file, speed=speed, tell=meter.set)
            found = replace(found, reserved=done)
            await _prove_raw(disk, where, raw, said)
        else:
            done, held, had = await reserve_by_staging(disk, where, speed=speed, tell=meter.set)
            if not done:
                said.forget()  # no bitmap grew
            found = replace(found, reserved=done, held=held)
            await _prove_staged(disk, where, had, said)
    seconds = time.monotonic() - started
    return replace(found, seconds=seconds, warnings=tuple(said.warnings))


def _span(where: Ranges) -> tuple[int, int]:
    """Return offset and length of what reaches from the first of some ranges to the last."""
    first = int(where.starts[0])
    return first, int(where.stops[-1]) - first


class _Said:
    """Takes warnings, and passes each on as soon as it is known."""

    def __init__(self, warn: Callable[[str], None] | None) -> None:
        self._warn = warn
        self.warnings: list[str] = []

    def __call__(self, text: str) -> None:
        self.warnings.append(text)
        if self._warn is not None:
            self._warn(text)

    def forget(self) -> None:
        """Take back what was foreseen and did not happen."""
        self.warnings.clear()


async def _tell_growth(
    disk: Disk, where: Ranges, said: _Said, before: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Say by how much dirty bitmaps may grow; return it, by name.

    :param before: what was said already; only what is more is said again.
    """
    active = disk.chain.active.node
    recording = [bitmap for bitmap in active.bitmaps if bitmap.recording]
    if not recording:
        return {}
    seen = await disk.map(*_span(where))
    wanted = dataless(seen, active.cluster_size or 512, disk.size) & where
    found = {}
    for bitmap in recording:
        found[bitmap.name] = total = wanted.align_out(bitmap.granularity, disk.size).total
        if total <= (before or {}).get(bitmap.name, 0):
            continue
        said(growth_warning(bitmap.name, total))
    return found


async def _prove_raw(disk: Disk, where: Ranges, raw: tuple[str, int], said: _Said) -> None:
    """See that the host's file system has space for all of it now."""
    file, start = raw
    left = await asyncio.to_thread(blank_ranges, file, start, disk.size)
    left = left & where
    if not left:
        return
    if hostfiles.reserved_ranges(file, start + disk.size) is None:
        said(
            f"the file system of {printable(file)} does not tell what it has reserved, but by "
            f"the success of the calls (fallocate): {left.total} bytes are not seen to be so"
        )
    else:
        said(_given_back(disk, left.total))


async def _prove_staged(disk: Disk, where: Ranges, had: Ranges, said: _Said) -> None:
    """See on the map that all of it has host space now.

    That the zeros were stored was seen while the image was frozen. What is not data by now is
    the guest's doing since, or zeros that had host space before.
    """
    seen = await disk.map(*_span(where))
    left = (dataless(seen, disk.chain.active.node.cluster_size or 512, disk.size) & where) - had
    gone = left & seen.holes()
    if gone:
        said(_given_back(disk, gone.total))
    if left - gone:
        said(
            f"{(left - gone).total} bytes of {disk.name} were discarded by the guest, or "
            "overwritten with zeros, meanwhile. Whether they have host space now cannot be told "
            "while the disk is in use; run it again, and they will"
        )
    # Clusters of preallocation=metadata: the image has a place for them, the file maybe none.
    mapped = seen.where(depth=0, zero=True, data=True) & where
    file = check_staging(disk)
    if mapped and await asyncio.to_thread(blank_ranges, file, 0, Path(file).stat().st_size):
        said(
            f"{mapped.total} bytes of {disk.name} were preallocated when {printable(file)} was "
            "made, but that file has holes: whether the host has space for them cannot be told "
            "while it is in use"
        )


def _given_back(disk: Disk, total: int) -> str:
    return (
        f"{total} bytes of {disk.name} have no host space any more: the guest discarded them "
        "meanwhile; run it again"
    )


def check_thin(disk: Disk) -> None:
    """Refuse an active layer into which nothing can be brought from below.

    :raise UnsupportedError: its format, or this QEMU with it.
    """
    active = disk.chain.active
    if active.format in _USELESS:
        raise UnsupportedError(
            f"a range of a {active.format} image cannot be allocated from its backing image: QEMU "
            "does not do it for that format",
            standing="nothing was touched",
        )
    check_copy_on_read(disk.vm.capabilities, active)


async def _allocate_thin(
    disk: Disk,
    where: Ranges,
    speed: Speed,
    progress: Callable[[Progress], None] | None,
) -> tuple[int, int]:
    """Bring what lies below into the active layer; return bytes done, and there before."""
    check_thin(disk)
    record = Record(
        run=Change.new_run(),
        operation="allocate",
        vm=await identify(disk.vm),
        devices=(disk.device.qom_path,),
        names=(disk.name,),
        locks=lock_names([disk.device]),
        images=host_files(disk.vm, disk.chain),
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
        found = await _bring_up(disk, where, speed, progress)
        await undisturbed(change.end())
    return found


async def _bring_up(
    disk: Disk,
    where: Ranges,
    speed: Speed,
    progress: Callable[[Progress], None] | None,
) -> tuple[int, int]:
    """Copy up until nothing of the ranges is below; return bytes done, and there before.

    The maps before and after, and the requests between, all go through one export.
    """
    active, span = disk.chain.active, _span(where)
    try:
        async with exported(
            disk, [active], hold_writer=active.data_file is not None, in_flight=_IN_FLIGHT
        ) as [client]:
            seen = await read_map(client, disk.chain, *span)
            left = total = (below(seen) & where).total
            already = (seen.where(depth=0, present=True) & where).total
            for _ in range(_ATTEMPTS):
                if left:
                    report = _Report(total, total - left, progress)
                    batches = _batches(disk, client, seen, where, speed)
                    await _cache(disk, client, batches, speed, report)
                    seen = await read_map(client, disk.chain, *span)
                seen = await _verified(disk, client, active, seen)
                before, left = left, (below(seen) & where).total
                if not left:
                    return total, already
                if 0 < before <= left:
                    break
    except (CommandError, NBDError):
        await ownership.ask(disk.vm.monitor, [disk.device], standing=None)
        await disk.refresh()
        _check_active(disk, active)
        raise
    raise UnsupportedError(
        f"{left} bytes of {disk.name} are still below the active layer: {active.format} does not "
        "take them, or the guest discards them as fast as they are allocated",
    )


def _batches(
    disk: Disk, client: Client, seen: AllocationMap, where: Ranges, speed: Speed
) -> Iterable[Batch]:
    limits = [speed.piece(min(client.max_cache_length, n)) for n in (_REQUEST, _ZEROS)]
    # A cluster of QED may be larger than a request; QEMU rounds that up by itself.
    unit = min(disk.chain.active.node.cluster_size or 512, client.max_cache_length)
    return requests(seen, unit, disk.size, *limits, where=where)


async def _verified(
    disk: Disk, client: Client, active: Layer, seen: AllocationMap
) -> AllocationMap:
    """Return the map once it is certain which chain it is of.

    Depths count from the active layer, and somebody may have dropped a layer from under it.

    :raise GraphError: the active layer itself is another one: an export follows it silently.
    """
    for _ in range(_ATTEMPTS):
        chain = disk.chain  # which it was read for
        await disk.refresh()
        _check_active(disk, active)
        if disk.chain.shape == chain.shape:
            return seen
        seen = await read_map(client, disk.chain, seen.start, seen.length)
    raise GraphError(f"the chain of {disk.name} changed during each of {_ATTEMPTS} maps")


def _check_active(disk: Disk, active: Layer) -> None:
    if disk.chain.active.node.name != active.node.name:
        raise _other_layer(disk)


def _other_layer(disk: Disk) -> GraphError:
    return GraphError(
        f"the active layer of {disk.name} is another one now: somebody took a snapshot",
        remedy="look at it, then try again: qmpblock disks ADDRESS",
    )


class _Report:
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


async def _cache(
    disk: Disk, client: Client, batches: Iterable[Batch], speed: Speed, report: _Report
) -> None:
    """Send the requests, some in flight, as fast as `speed` allows.

    Between them the export must still be of the active node: a foreign snapshot redirects it
    silently, and what is asked for would go to the overlay (facts 1.6).
    """
    clock, left = time.monotonic, iter(batches)
    looked = clock()
    turn = asyncio.Lock()  # under a limit, one at a time

    async def work() -> None:
        nonlocal looked
        for batch in left:
            if clock() - looked > _LOOK:
                looked = clock()
                await _check_export(disk, client)
            async with turn if speed.rate else nullcontext():
                await speed.wait(batch.length)
                await client.cache(batch.start, batch.length)
            report.add(batch.length)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_IN_FLIGHT):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _check_export(disk: Disk, client: Client) -> None:
    await ownership.ask(disk.vm.monitor, standing=None)  # where QEMU is not held from migrating
    wanted = disk.chain.active.node.name
    for export in await disk.vm.monitor.execute("query-block-exports"):
        if export["id"] == client.export and export["node-name"] != wanted:
            raise _other_layer(disk)
