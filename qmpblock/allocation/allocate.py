"""Allocate: make a range of a running disk stand in its active layer, contents unchanged.

*Thin*: what some layer below holds comes into the active layer; what no layer holds stays blank
(`qmpblock.allocation.thin`).

*Full*: what no layer holds, and mere zeros, get host space too (`qmpblock.allocation.rawfile`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.allocation.plan import dataless, growth_warning, rounded
from qmpblock.allocation.rawfile import raw_file, reserve_ranges
from qmpblock.allocation.staged import check_staged, reserve_by_staging
from qmpblock.allocation.thin import AllocationResult, Report, allocator, check_thin
from qmpblock.chains.stranded import bring_in
from qmpblock.changes.leftovers import make_way
from qmpblock.errors import UNTOUCHED, RequestError, printable
from qmpblock.graph.writable import check_disk
from qmpblock.host import imagefiles, space
from qmpblock.host.space import blank_ranges, check_reservable
from qmpblock.managers import Work
from qmpblock.names import lock_names
from qmpblock.qemu import ownership
from qmpblock.ranges import Ranges
from qmpblock.sizes import check_range
from qmpblock.speed import Speed

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.job import Progress

__all__ = ["AllocationResult", "allocate", "allocate_ranges", "check_thin"]


async def allocate(
    disk: MappedDisk,
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
    await bring_in(disk)
    active = disk.chain.active
    offset, length = check_range(disk.size, offset, length)
    cluster = active.node.cluster_size or 512
    first, count = rounded(offset, length, cluster, disk.size)
    if independent and (first, count) != (0, disk.size):
        raise RequestError(
            "to be independent of its backing images a disk must be allocated whole",
            standing=UNTOUCHED,
            remedy="leave --offset and --length out",
        )
    check_disk(disk.device)
    if independent and len(disk.chain.layers) > 1:
        await ownership.ask_for_change(disk.vm, Work("independent", active.file), asked=True)
    where = Ranges([(first, first + count)])
    done = await allocate_ranges(disk, where, full=full, speed=speed, progress=progress, warn=warn)
    result = replace(done, offset=offset, length=length, rounded_offset=first, rounded_length=count)
    if independent and len(disk.chain.layers) > 1:
        from qmpblock.allocation.pull import stream

        async with stream(disk) as job:
            async for seen in job:
                if progress is not None:
                    progress(seen)
        if warn is not None:
            for text in job.warnings:
                warn(text)
        result = replace(result, warnings=(*result.warnings, *job.warnings))
    return replace(result, seconds=time.monotonic() - started)


async def allocate_ranges(
    disk: MappedDisk,
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
    result = AllocationResult(disk.name, *span, *span)
    pid = disk.vm.monitor.peer_pid or 0  # it has one, where a file is local
    async with disk.vm.unless_gone():
        raw = await raw_file(disk) if full else None
        if raw is not None:
            file, begin = raw
            in_file = [(begin + start, begin + stop) for start, stop in where]
            check_reservable(file, pid, in_file)
        elif full:
            file = await check_staged(disk)
            if disk.chain.active.data_file is None:
                check_reservable(file, pid, [(0, where.total)], grows=True)
            work = Work("reserve", disk.chain.active.file)
            await ownership.ask_for_change(disk.vm, work, asked=True)
    if not where:
        return result
    speed = speed or Speed()
    staged = full and raw is None
    said = _Said(warn)
    growing = await _tell_growth(disk, where, said) if staged else {}
    if len(disk.chain.layers) > 1:
        async with allocator(disk) as thin:
            allocated, already = await thin.allocate_ranges(where, speed=speed, progress=progress)
        result = replace(result, allocated=allocated, already=already)
        if growing:  # data that came up and turned out to be zeros will be reserved, too
            growing = await _tell_growth(disk, where, said, growing)
    if full:
        meter = Report(0, 0, progress, "reserving")
        if raw is not None:
            await ownership.ask(disk.vm.monitor, [disk.device], standing=None)
            done = await reserve_ranges(file, pid, in_file, speed=speed, tell=meter.set)
            result = replace(result, reserved=done)
            await _prove_raw(disk, where, raw, said)
        else:
            done, held, had = await reserve_by_staging(disk, where, speed=speed, tell=meter.set)
            if not done:
                said.forget()  # no bitmap grew
            result = replace(result, reserved=done, held=held)
            await _prove_staged(disk, where, had, said)
    seconds = time.monotonic() - started
    return replace(result, seconds=seconds, warnings=tuple(said.warnings))


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
    disk: MappedDisk, where: Ranges, said: _Said, before: Mapping[str, int] | None = None
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
    growth = {}
    for bitmap in recording:
        growth[bitmap.name] = total = wanted.align_out(bitmap.granularity, disk.size).total
        if total <= (before or {}).get(bitmap.name, 0):
            continue
        said(growth_warning(bitmap.name, total))
    return growth


async def _prove_raw(disk: MappedDisk, where: Ranges, raw: tuple[str, int], said: _Said) -> None:
    """See that the host's file system has space for all of it now."""
    file, start = raw
    pid = disk.vm.monitor.peer_pid
    left = await asyncio.to_thread(blank_ranges, file, start, disk.size, vm=pid)
    left = left & where
    if not left:
        return
    if space.reserved_ranges(file, start + disk.size, vm=pid) is None:
        said(
            f"the file system of {printable(file)} does not tell what it has reserved, but by "
            f"the success of the calls (fallocate): {left.total} bytes are not seen to be so"
        )
    else:
        said(_given_back(disk, left.total))


async def _prove_staged(disk: MappedDisk, where: Ranges, had: Ranges, said: _Said) -> None:
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
    if not mapped:
        return
    active = disk.chain.active
    pid = disk.vm.monitor.peer_pid
    file = imagefiles.local_path(pid, active)
    if file is None:
        why = "cannot be seen any more"
    elif await asyncio.to_thread(blank_ranges, file, 0, Path(file).stat().st_size, vm=pid):
        why = "has holes"
    else:
        return
    said(
        f"{mapped.total} bytes of {disk.name} were preallocated when {printable(active.file)} was "
        f"made, but that file {why}: whether the host has space for them cannot be told while it "
        "is in use"
    )


def _given_back(disk: MappedDisk, total: int) -> str:
    return (
        f"{total} bytes of {disk.name} have no host space any more: the guest discarded them "
        "meanwhile; run it again"
    )
