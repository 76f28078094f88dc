"""Policies carried out: look at the disks, say what is to be done, do it.

`plan` looks at every disk of a policy and changes nothing. `apply` looks and does, several VMs
at once, one disk of a VM at a time (it has one NBD server): each step is one that can be given
up, killed and repeated (`Disk.allocate`, `Disk.stream`), and what is to be done is computed
from the disk as it is. So `apply` can be run again at any time, and does what is left.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qmpblock import hostfiles, lock
from qmpblock.allocation import check_thin
from qmpblock.cancellation import undisturbed
from qmpblock.chainplan import plan_stream
from qmpblock.change import lock_names, make_way
from qmpblock.errors import (
    BusyError,
    Error,
    NotFoundError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.graph import Layer
from qmpblock.lock import Holder
from qmpblock.pace import Speed
from qmpblock.policyplan import Changes, Facts, Picture, Step, plan_changes
from qmpblock.ranges import Ranges
from qmpblock.reserving import raw_file
from qmpblock.staging import check_staging

if TYPE_CHECKING:
    from qmpblock.disk import Disk, LayerMap
    from qmpblock.extents import AllocationMap
    from qmpblock.job import Progress
    from qmpblock.policyfile import Amount, DiskPolicy, Policy
    from qmpblock.vm import VM

__all__ = ["DiskPlan", "DiskResult", "Room", "apply", "plan", "share_room"]

Connect = Callable[[str], AbstractAsyncContextManager["VM"]]

_LOOK = 0.5  # seconds between looks at the free space of the host
_SLICE = 256 << 20  # bytes that a staged commit puts beside the image for a while, at most
_AT_ONCE = 8  # VMs that are looked at


@dataclass(frozen=True)
class Room:
    """The host file system on which a disk's active image grows.

    :ivar device: its number there; also `path` of the image.
    :ivar free: bytes that are; also `keep`, those that must stay so.
    :ivar needed: by what is to be done, with what it takes only for a while.
    """

    device: int
    path: str
    free: int
    keep: int
    needed: int

    @classmethod
    def of(cls, path: str, keep: Amount | None, needed: int) -> Room:
        """Look at the file system of an image."""
        found = os.statvfs(path)
        kept = 0 if keep is None else keep.of(found.f_blocks * found.f_frsize)
        free = found.f_bavail * found.f_frsize
        return cls(Path(path).stat().st_dev, path, free, kept, needed)

    def is_short(self) -> bool:
        """Whether less is free now than must stay so."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize < self.keep

    def check(self, promised: int = 0) -> None:
        """Refuse what would leave less than must stay free.

        :param promised: bytes that others will still take.
        :raise Error: it would.
        """
        left = self.free - promised - self.needed
        if left < self.keep:
            raise Error(
                f"the file system of {printable(self.path)} has {self.free} bytes free, of which "
                f"{promised} are promised to other disks; this one needs {self.needed}, and the "
                f"policy keeps {self.keep} free",
                standing="nothing was touched",
                remedy="make room, or keep less free",
            )


@dataclass(frozen=True)
class DiskPlan:
    """What is to be done to one disk.

    :ivar name: of the disk in its VM.
    :ivar today: its layers; None where they could not be looked at.
    :ivar changes: None where it cannot be done, for the reason `error`.
    """

    policy: DiskPolicy
    name: str
    today: Picture | None = None
    changes: Changes | None = None
    room: Room | None = None
    warnings: tuple[str, ...] = ()
    error: Error | None = None


@dataclass(frozen=True)
class DiskResult:
    """What was done to one disk.

    :ivar state: `done`, `nothing` (to do), or `failed`.
    :ivar allocated: bytes that came from layers below; `reserved`: that got host space.
    :ivar dropped: files that left the chain.
    :ivar held: the longest time, in seconds, for which the guest's I/O was held.
    """

    policy: DiskPolicy
    name: str
    state: Literal["done", "nothing", "failed"]
    allocated: int = 0
    reserved: int = 0
    dropped: tuple[str, ...] = ()
    held: float = 0.0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    error: Error | None = None


# -- plan


async def plan(policy: Policy, *, connect: Connect | None = None) -> tuple[DiskPlan, ...]:
    """Say what a policy would do, disk by disk, in its order. Changes nothing.

    What cannot be done says so in its plan's `error`; nothing is raised for one disk.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    """
    return share_room(await _look_at_all(policy, connect or _connect, undo=False))


async def _look_at_all(policy: Policy, connect: Connect, *, undo: bool) -> tuple[DiskPlan, ...]:
    turns = asyncio.Semaphore(_AT_ONCE)
    vms: dict[str, list[DiskPolicy]] = {}
    for wanted in policy.disks:
        vms.setdefault(wanted.address, []).append(wanted)
    found: dict[DiskPolicy, DiskPlan] = {}

    async def look_at(address: str, disks: list[DiskPolicy]) -> None:
        seen: dict[str, DiskPolicy] = {}
        async with turns:
            try:
                async with connect(address) as vm:
                    for wanted in disks:
                        found[wanted] = await _tried(vm, wanted, seen, undo=undo)
            except Error as error:
                for wanted in disks:
                    nothing = DiskPlan(wanted, wanted.disk, error=error)
                    found.setdefault(wanted, nothing)

    try:
        async with asyncio.TaskGroup() as group:
            for address, disks in vms.items():
                group.create_task(look_at(address, disks))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return tuple(found[wanted] for wanted in policy.disks)


async def _tried(
    vm: VM, wanted: DiskPolicy, seen: dict[str, DiskPolicy], *, undo: bool
) -> DiskPlan:
    try:
        disk = await vm.disk(wanted.disk)
        first = seen.setdefault(disk.device.qom_path, wanted)
        if first is not wanted:
            raise RequestError(
                f"{printable(wanted.disk)} is the disk that the policy calls "
                f"{printable(first.disk)}, too: {wanted.place}"
            )
        return await _look(disk, wanted, undo=undo)
    except Error as error:
        return DiskPlan(wanted, wanted.disk, error=error)


def share_room(plans: tuple[DiskPlan, ...]) -> tuple[DiskPlan, ...]:
    """Give the free space of each file system to the disks in their order. Pure.

    Those for which not enough is left get an error.
    """
    promised: dict[int, int] = {}
    shared = []
    for one in plans:
        if one.room is not None and one.error is None and one.changes and one.changes.steps:
            taken = promised.get(one.room.device, 0)
            try:
                one.room.check(taken)
                promised[one.room.device] = taken + one.room.needed
            except Error as error:
                shared.append(replace(one, error=error))
                continue
        shared.append(one)
    return tuple(shared)


async def _look(disk: Disk, wanted: DiskPolicy, *, undo: bool) -> DiskPlan:
    """Look at a disk, and plan.

    :param undo: also undo what a controller that died left; else that is an error.
    """
    vm = disk.vm
    if undo:
        await make_way(vm, lock_names([disk.device]))
    else:
        await _check_free(vm, lock_names([disk.device]))
    layers = await disk.layers()
    chain = disk.chain
    today = Picture(tuple(one.layer.file for one in layers), tuple(one.map for one in layers))
    base = _base(disk, wanted)
    facts = Facts(
        today,
        chain.active.node.cluster_size or 512,
        base,
        like=await _pattern(disk, wanted, layers, base),
    )
    refusal: UnsupportedError | None = None
    staged = False
    if wanted.allocation in ("full", "like"):
        try:
            raw = await raw_file(disk)
            if raw is None:
                check_staging(disk)
                staged = True
            else:
                blank = await asyncio.to_thread(_blank, *raw, disk.size)
                facts = replace(facts, blank=blank)
        except UnsupportedError as error:
            refusal = error  # which matters only if there is something to reserve
    changes = plan_changes(wanted, facts)
    if changes.reserve and refusal is not None:
        raise refusal
    if changes.move or changes.zeros or any(step.verb == "allocate" for step in changes.steps):
        check_thin(disk)
    warnings: list[str] = []
    if changes.leaving:
        graph = await vm.graph()
        device = graph.device(disk.device.qom_path)
        warnings += plan_stream(graph, device, None, wanted.base).warnings
    recording = [b.name for b in chain.active.node.bitmaps if b.recording]
    if staged and changes.reserve:
        warnings += [
            f"the dirty bitmap {printable(name)} counts what is reserved, {changes.reserve} "
            "bytes, as written: the next incremental backup is as much larger"
            for name in recording
        ]
    temporary = min(changes.reserve, _SLICE) if staged else 0
    room = _room(disk, wanted, changes.move + changes.reserve + temporary)
    return DiskPlan(wanted, disk.name, today, changes, room, tuple(warnings))


async def _check_free(vm: VM, names: tuple[str, ...]) -> None:
    for name in names:
        holder = await lock.read(vm.monitor, name)
        if holder is None:
            continue
        if isinstance(holder, Holder) and holder.is_dead():
            raise BusyError(
                f"a controller that died left this disk in the middle of a change: {holder}",
                standing="nothing was touched",
                remedy="apply undoes it first; so does: qmpblock recover ADDRESS",
            )
        raise BusyError(
            f"another controller is at work on this disk: {holder}",
            standing="nothing was touched",
            remedy="wait for it, or end it",
        )


def _base(disk: Disk, wanted: DiskPolicy) -> int:
    """Return the depth of the uppermost layer below the active one that is to stay."""
    layers = disk.chain.layers
    if wanted.base is not None:
        depth = disk.chain.layer(wanted.base).depth
        if depth == 0:
            raise RequestError(
                f"{printable(wanted.base)} is the active layer of {disk.name}, so it cannot be "
                "its own base",
                standing="nothing was touched",
            )
        return depth
    return len(layers) if wanted.independent else 1


async def _pattern(
    disk: Disk, wanted: DiskPolicy, layers: tuple[LayerMap, ...], base: int
) -> Ranges | None:
    """Return where the layer that is to be imitated has host space."""
    if wanted.like is None:
        return None
    try:
        layer = disk.chain.layer(wanted.like)
    except NotFoundError as error:
        own = await _map_of_file(disk, wanted, wanted.like, error)
    else:
        nodes = (layer.node.name, layer.storage.name if layer.storage else "")
        if 0 < layer.depth < base and wanted.like in nodes:
            raise RequestError(
                f"the node {printable(wanted.like)} goes with its layer, and the policy could not "
                "be applied again",
                standing="nothing was touched",
                remedy=f"name the layer by its file: {printable(layer.file)}",
            )
        own = layers[layer.depth].map
    return (
        own.where(present=True, zero=False)
        | own.where(present=True, data=True)
        | own.where(present=True, reserved=True)
    )


async def _map_of_file(
    disk: Disk, wanted: DiskPolicy, file: str, error: NotFoundError
) -> AllocationMap:
    """Map an image that is not, or no longer, in the chain."""
    from qmpblock.qemuimg import QemuImg, blockdev, format_of

    if not hostfiles.same_files(disk.vm.monitor.peer_pid) or not Path(file).is_file():
        error.remedy = "a layer that has left the chain must be a file on this host, by its path"
        raise error
    fmt = wanted.like_format or format_of(file)
    found = await QemuImg(stall=disk.vm.stall).map(blockdev(fmt, file), [fmt], shared=True)
    return found.own()


def _blank(file: str, start: int, size: int) -> Ranges:
    """Return which bytes of a disk that lies in a file as it is have no host space.

    Metadata only: the file system's holes, less what it has reserved (FIEMAP).
    """
    stop, at = start + size, start
    holes: list[tuple[int, int]] = []
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_blocks * 512 >= max(stop, os.fstat(fd).st_size):
            return Ranges()
        while at < stop:
            try:
                data = min(os.lseek(fd, at, os.SEEK_DATA), stop)
            except OSError:  # ENXIO: no data from here on
                data = stop
            if data > at:
                holes.append((at, data))
            if data >= stop:
                break
            at = os.lseek(fd, data, os.SEEK_HOLE)
    finally:
        os.close(fd)
    reserved = hostfiles.reserved_ranges(file, stop) or Ranges()
    left = Ranges(holes) - reserved
    return Ranges.from_arrays(left.starts - start, left.stops - start)


def _room(disk: Disk, wanted: DiskPolicy, needed: int) -> Room | None:
    active = disk.chain.active
    if active.data_file is not None:
        active = Layer(0, active.node, active.data_file)
    path = hostfiles.local_path(disk.vm.monitor.peer_pid, active)
    if path is not None:
        return Room.of(path, wanted.keep_free, needed)
    if wanted.keep_free is None or (
        active.storage is not None and active.storage.driver == "host_device"
    ):
        return None  # a block device has no file system that it could fill
    raise UnsupportedError(
        f"the policy keeps host space free, but {printable(active.file)} is not on this host",
        standing="nothing was touched",
        remedy="run qmpblock on the VM's host, by a UNIX monitor, or leave keep_free out",
    )


def _connect(address: str) -> AbstractAsyncContextManager[VM]:
    from qmpblock.vm import connect

    return connect(address)


# -- apply


async def apply(
    policy: Policy,
    *,
    connect: Connect | None = None,
    planned: Callable[[tuple[DiskPlan, ...]], None] | None = None,
    progress: Callable[[DiskPolicy, Progress], None] | None = None,
    ended: Callable[[DiskResult], None] | None = None,
) -> tuple[DiskResult, ...]:
    """Do what a policy says; return what was done, disk by disk, in its order.

    A disk that fails does not keep the others from being done. Cancelling gives up what is
    under way, as `Disk.allocate` and `Disk.stream` do; what was done stays, and the next
    `apply` goes on from there.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    :param planned: is called with what is about to be done.
    :param progress: is called with how far a disk is.
    :param ended: is called when a disk is done, or has failed.
    """
    connect = connect or _connect
    results: dict[DiskPolicy, DiskResult] = {}

    def end(result: DiskResult) -> None:
        results[result.policy] = result
        if ended is not None:
            ended(result)

    plans = share_room(await _look_at_all(policy, connect, undo=True))
    if planned is not None:
        planned(plans)
    todo = []
    for one in plans:
        if one.error is not None:
            end(DiskResult(one.policy, one.name, "failed", error=one.error))
        elif one.changes is not None and not one.changes.steps:
            end(DiskResult(one.policy, one.name, "nothing", warnings=one.warnings))
        else:
            todo.append(one.policy)
    work = _Applying(connect, progress)
    await _in_turn(todo, policy.parallel, work.disk, end)
    return tuple(results[wanted] for wanted in policy.disks)


async def _in_turn(
    disks: list[DiskPolicy],
    parallel: int,
    work: Callable[[DiskPolicy], asyncio.Future[DiskResult]],
    end: Callable[[DiskResult], None],
) -> None:
    """Do the disks in order, so many at once, of each VM one at a time."""
    waiting = list(disks)
    running: dict[asyncio.Future[DiskResult], str] = {}
    try:
        while waiting or running:
            for wanted in list(waiting):
                if len(running) < parallel and wanted.address not in running.values():
                    waiting.remove(wanted)
                    running[work(wanted)] = wanted.address
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del running[task]
                end(task.result())
    finally:
        for task in running:
            task.cancel()
        if running:
            await undisturbed(asyncio.wait(running))


class _Applying:
    """Does single disks, and knows what those under way will still take of the host's space."""

    def __init__(
        self, connect: Connect, progress: Callable[[DiskPolicy, Progress], None] | None
    ) -> None:
        self._connect = connect
        self._progress = progress
        self._taking: dict[DiskPolicy, tuple[Room, int]] = {}  # with the image's size before

    def disk(self, wanted: DiskPolicy) -> asyncio.Future[DiskResult]:
        """Begin with one disk; the future's result says how it ended."""
        return asyncio.ensure_future(self._tried(wanted))

    async def _tried(self, wanted: DiskPolicy) -> DiskResult:
        started = time.monotonic()
        try:
            async with self._connect(wanted.address) as vm:
                result = await self._one(await vm.disk(wanted.disk), wanted)
        except Error as error:
            result = DiskResult(wanted, wanted.disk, "failed", error=error)
        finally:
            self._taking.pop(wanted, None)
        return replace(result, seconds=time.monotonic() - started)

    async def _one(self, disk: Disk, wanted: DiskPolicy) -> DiskResult:
        plan = await _look(disk, wanted, undo=True)  # again: hours may have passed
        assert plan.changes is not None  # _look raises where it cannot say
        if not plan.changes.steps:
            return DiskResult(wanted, disk.name, "nothing", warnings=plan.warnings)
        if plan.room is not None:
            plan.room.check(self._promised(plan.room.device))
            self._taking[wanted] = plan.room, _used(plan.room.path)
        return await _unless_short(self._steps(disk, plan, plan.changes), plan.room)

    def _promised(self, device: int) -> int:
        """Return how much of a file system those under way will still take."""
        return sum(
            max(0, room.needed - (_used(room.path) - before))
            for room, before in self._taking.values()
            if room.device == device
        )

    async def _steps(self, disk: Disk, plan: DiskPlan, changes: Changes) -> DiskResult:
        wanted = plan.policy
        speed = Speed(wanted.speed)
        result = DiskResult(wanted, disk.name, "done", warnings=plan.warnings)
        before = 0
        for step in changes.steps:
            tell = self._teller(wanted, step, before, changes.work)
            if step.verb == "drop" and not wanted.independent:
                async with disk.stream(base=wanted.base, speed=wanted.speed) as job:
                    async for seen in job:
                        tell(seen)
                result = replace(result, allocated=result.allocated + step.bytes)
            else:
                done = await disk.allocate(
                    step.offset,
                    step.length,
                    full=step.verb == "reserve",
                    independent=step.verb == "drop",
                    speed=speed,
                    progress=tell,
                )
                result = replace(
                    result,
                    allocated=result.allocated + done.allocated,
                    reserved=result.reserved + done.reserved,
                    held=max(result.held, done.held),
                    warnings=tuple(dict.fromkeys((*result.warnings, *done.warnings))),
                )
            before += step.bytes
        return replace(result, dropped=changes.leaving)

    def _teller(
        self, wanted: DiskPolicy, step: Step, before: int, total: int
    ) -> Callable[[Progress], None]:
        """Make what tells of the whole disk what a step tells of itself."""

        def tell(seen: Progress) -> None:
            if self._progress is None:
                return
            share = min(1.0, seen.done / seen.total) if seen.total else 0.0
            done = min(total, before + int(step.bytes * share))
            eta = (total - done) / seen.rate if seen.rate > 0 else None
            self._progress(wanted, replace(seen, done=done, total=total, eta=eta))

        return tell


def _used(path: str) -> int:
    try:
        return Path(path).stat().st_blocks * 512
    except OSError:
        return 0  # unplugged and gone, say: it takes no more


async def _unless_short(work: Coroutine[Any, Any, DiskResult], room: Room | None) -> DiskResult:
    """Do the work, and give it up when the host has less free than must stay so."""
    task = asyncio.ensure_future(work)
    short = False
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            if room is not None and room.keep and room.is_short():
                short = True
                break
    finally:
        if not task.done():
            task.cancel()
            await undisturbed(asyncio.wait({task}))
    if short and task.cancelled():
        assert room is not None  # that is what was short
        raise Error(
            f"the file system of {printable(room.path)} has less than {room.keep} bytes free, "
            "which the policy keeps so",
            standing="it was given up; what was allocated by then stays, contents are as they "
            "were, and nothing of ours is left in the VM",
            remedy="make room, then apply it again: it goes on from there",
        )
    return task.result()
