"""What there is to say in numbers of a running VM, and of many at once.

A VM that does not answer costs no more than the time that was given for one, and is told of, too.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.allocation.room import find_place, look_at
from qmpblock.cancellation import task_group
from qmpblock.errors import BusyError, Error, MonitorError, MonitorHeldError, RecordError
from qmpblock.host.imagefiles import local_path
from qmpblock.names import NBD_LOCK
from qmpblock.qemu import lock

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.graph.model import JobInfo
    from qmpblock.vm import VM, Disk

__all__ = ["DiskFigures", "LayerFigures", "VMFigures", "examine", "free_beside", "gather"]

_AT_ONCE = 64  # VMs that are looked at
_MAPS = 0.5  # of the time for a VM; the rest is for whether it answers at all


@dataclass(frozen=True)
class LayerFigures:
    """What of a disk a layer supplies, in bytes.

    :ivar data: that may be other than zeros.
    :ivar zero: zeros that it holds; `reserved`: those of them that have host space.
    """

    depth: int
    data: int
    zero: int
    reserved: int


@dataclass(frozen=True)
class DiskFigures:
    """One disk. In bytes; None is what cannot be told from here, or was not asked for.

    :ivar layers: the active one first.
    :ivar backing: what layers below the active one supply.
    :ivar room: host space that is reserved ahead of the guest.
    :ivar host_free: what is free where the active image grows.
    :ivar map_seconds: how long the map took that the layers are of.
    :ivar error: why there is no map.
    :ivar called: what the VM's manager calls it; None: as it is.
    """

    disk: str
    size: int
    layers: tuple[LayerFigures, ...] | None
    backing: int | None
    room: int | None
    host_free: int | None
    map_seconds: float | None
    error: str | None
    called: str | None = None


@dataclass(frozen=True)
class VMFigures:
    """One VM.

    :ivar up: whether it answered, in time.
    :ivar held: whether that is because another client has its monitor, one of ours, say, as far as
        that can be seen from here.
    :ivar error: why it did not.
    :ivar seconds: how long all of it took.
    :ivar recovery_needed: whether a controller that died left something; None: it cannot be told.
    """

    address: str
    up: bool
    held: bool
    error: str | None
    seconds: float
    recovery_needed: bool | None = None
    disks: tuple[DiskFigures, ...] = ()
    jobs: tuple[JobInfo, ...] = ()


async def gather(
    addresses: Sequence[str],
    connect: Callable[[str], AbstractAsyncContextManager[VM]],
    *,
    limit: float,
    maps: bool = True,
) -> tuple[VMFigures, ...]:
    """Look at many VMs at once; each is in what comes back, once, in that order.

    Cancelling it leaves nothing in any of them.

    :param limit: seconds for each; what is to be undone in a VM that does not answer any more may
        take up to its stall limit besides.
    :param maps: take maps, for which an export is added to each VM for a moment.
    """
    few = asyncio.Semaphore(_AT_ONCE)

    async def one(address: str) -> VMFigures:
        async with few:
            return await _within(address, connect, limit, maps=maps)

    async with task_group() as group:
        tasks = [group.create_task(one(address)) for address in dict.fromkeys(addresses)]
    return tuple(task.result() for task in tasks)


async def _within(
    address: str,
    connect: Callable[[str], AbstractAsyncContextManager[VM]],
    limit: float,
    *,
    maps: bool,
) -> VMFigures:
    began = time.monotonic()

    def silent(why: str, *, held: bool = False) -> VMFigures:
        return VMFigures(address, False, held, why, time.monotonic() - began)

    try:
        async with asyncio.timeout(limit), connect(address) as vm:
            return await examine(vm, address, maps=limit * _MAPS if maps else 0)
    except TimeoutError:
        return silent(f"it has not answered within {limit:g} s")
    except MonitorHeldError as error:  # or it hangs: where nobody is seen, nobody knows
        return silent(error.message, held=bool(error.holders))
    except Error as error:
        return silent(error.message)


async def examine(vm: VM, address: str, *, maps: float) -> VMFigures:
    """Look at one VM; see `gather`.

    :param maps: seconds for those of all its disks; 0: none are taken.
    :raise MonitorError: it does not answer.
    :raise Error: what it says cannot be made sense of.
    """
    began = time.monotonic()
    needed = await _recovery_needed(vm)
    until = asyncio.get_running_loop().time() + maps if maps else None
    called = {disk: name for name, disk in (await vm.disks_called(await vm.graph())).items()}
    disks = tuple([await _disk(disk, until, called.get(disk.name)) for disk in await vm.disks()])
    jobs = await vm.jobs()
    seconds = time.monotonic() - began
    return VMFigures(address, True, False, None, seconds, needed, disks, jobs)


async def _recovery_needed(vm: VM) -> bool | None:
    try:
        left = await vm.recover(dry_run=True)
    except RecordError:
        return True  # what cannot be read nobody can say no of
    except BusyError:
        return None
    # A controller at work, such as a watcher, is no reason to recover.
    return any(step.verb != "leave" for one in left for step in one.steps)


async def _disk(disk: Disk, until: float | None, called: str | None) -> DiskFigures:
    """Look at one disk.

    :param until: by the event loop's clock, when its map has to be there; None: none is taken.
    :param called: what its manager calls it.
    """
    seen: AllocationMap | None = None
    seconds, why = None, None
    if until is not None:
        began = time.monotonic()
        try:
            async with asyncio.timeout_at(until):
                seen = await disk.map(reserved=True)
            seconds = time.monotonic() - began
        except TimeoutError:
            why = await _too_long(disk)
        except MonitorError:
            raise
        except Error as error:
            why = error.message
    path = local_path(disk.vm.monitor.peer_pid, disk.chain.active)
    return DiskFigures(
        disk=disk.name,
        size=disk.size,
        layers=None
        if seen is None
        else tuple(
            LayerFigures(one.depth, one.data, one.zero, one.reserved)
            for one in seen.totals().layers
        ),
        backing=None if seen is None else seen.not_in_active().total,
        room=await _room(disk),
        host_free=None if path is None else free_beside(path),
        map_seconds=seconds,
        error=why,
        called=called,
    )


async def _too_long(disk: Disk) -> str:
    """Say why there was no map in time: a VM that takes a backup is not one that is silent."""
    holder = await lock.read(disk.vm.monitor, NBD_LOCK)
    if holder is None:
        return "its map takes longer than there is time for"
    return f"somebody else uses the VM's NBD server: {holder}"


async def _room(disk: Disk) -> int | None:
    try:
        space = await look_at(await find_place(disk), 0)
    except MonitorError:
        raise
    except Error:
        return None  # it can have none, or not as far as it can be seen from here
    return space.room.total if space.known else None


def free_beside(path: str) -> int | None:
    """Return the bytes that are free for a user where a file is; None where that is not told."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
