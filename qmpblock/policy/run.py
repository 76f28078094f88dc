"""Policies carried out: look at the disks, say what is to be done, do it.

`plan` looks at every disk of a policy and changes nothing. `apply` looks and does, several VMs
at once, one disk of a VM at a time (it has one NBD server): each step is one that can be given
up, killed and repeated (`Disk.allocate`, `Disk.stream`), and what is to be done is computed
from the disk as it is. So `apply` can be run again at any time, and does what is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qmpblock.allocation.allocate import allocate_ranges
from qmpblock.allocation.room import RoomResult, make_room
from qmpblock.cancellation import task_group, undisturbed
from qmpblock.errors import Error, RequestError, printable
from qmpblock.policy.look import DiskPlan, look, share_space
from qmpblock.policy.steps import PlannedStep
from qmpblock.ranges import Ranges
from qmpblock.speed import Speed

if TYPE_CHECKING:
    from qmpblock.host.space import HostSpace
    from qmpblock.policy.file import DiskPolicy, Policy
    from qmpblock.policy.steps import Changes
    from qmpblock.qemu.job import Progress
    from qmpblock.vm import VM, Disk

__all__ = ["Connect", "DiskPlan", "DiskResult", "apply", "as_error", "connect_to", "plan"]

Connect = Callable[[str], AbstractAsyncContextManager["VM"]]

_LOOK = 0.5  # seconds between looks at the free space of the host
_AT_ONCE = 8  # VMs that are looked at


@dataclass(frozen=True)
class DiskResult:
    """What was done to one disk.

    :ivar state: `done`, `nothing` (to do), or `failed`.
    :ivar allocated: bytes that came from layers below; `reserved`: that got host space.
    :ivar dropped: files that left the chain.
    :ivar held: the longest time, in seconds, for which the guest's I/O was held.
    :ivar ahead: the room ahead of the guest, if the policy wants any and it got so far.
    """

    policy: DiskPolicy
    name: str
    state: Literal["done", "nothing", "failed"]
    allocated: int = 0
    reserved: int = 0
    dropped: tuple[str, ...] = ()
    held: float = 0.0
    seconds: float = 0.0
    ahead: RoomResult | None = None
    warnings: tuple[str, ...] = ()
    error: Error | None = None


# -- plan


async def plan(policy: Policy, *, connect: Connect | None = None) -> tuple[DiskPlan, ...]:
    """Say what a policy would do, disk by disk, in its order. Changes nothing.

    What cannot be done says so in its plan's `error`; nothing is raised for one disk.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    """
    return share_space(await _look_at_all(policy, connect or connect_to, undo=False))


async def _look_at_all(policy: Policy, connect: Connect, *, undo: bool) -> tuple[DiskPlan, ...]:
    turns = asyncio.Semaphore(_AT_ONCE)
    vms: dict[str, list[DiskPolicy]] = {}
    for wanted in policy.disks:
        vms.setdefault(wanted.address, []).append(wanted)
    plans: dict[DiskPolicy, DiskPlan] = {}

    async def look_at(address: str, disks: list[DiskPolicy]) -> None:
        seen: dict[str, DiskPolicy] = {}
        async with turns:
            try:
                async with connect(address) as vm:
                    for wanted in disks:
                        plans[wanted] = await _tried(vm, wanted, seen, undo=undo)
            except Error as error:
                for wanted in disks:
                    nothing = DiskPlan(wanted, wanted.disk, error=error)
                    plans.setdefault(wanted, nothing)

    async with task_group() as group:
        for address, disks in vms.items():
            group.create_task(look_at(address, disks))
    return tuple(plans[wanted] for wanted in policy.disks)


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
        return await look(disk, wanted, undo=undo)
    except (Error, OSError) as error:
        return DiskPlan(wanted, wanted.disk, error=as_error(error))


def as_error(error: Error | OSError) -> Error:
    """Say of a file of this host that cannot be opened what an Error would."""
    return error if isinstance(error, Error) else Error(f"on this host: {printable(error)}")


def connect_to(address: str) -> AbstractAsyncContextManager[VM]:
    """Connect to a VM as `qmpblock.connect` does."""
    from qmpblock.vm import connect

    return connect(address)


def _nothing(plan: DiskPlan) -> DiskResult:
    ahead = None
    if plan.ahead is not None:
        room = plan.ahead.room
        ahead = RoomResult(
            plan.name, plan.ahead.file, plan.ahead.wanted, room, 0, room, plan.ahead.full
        )
    return DiskResult(plan.policy, plan.name, "nothing", ahead=ahead, warnings=plan.warnings)


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
    connect = connect or connect_to
    results: dict[DiskPolicy, DiskResult] = {}

    def end(result: DiskResult) -> None:
        results[result.policy] = result
        if ended is not None:
            ended(result)

    plans = share_space(await _look_at_all(policy, connect, undo=True))
    if planned is not None:
        planned(plans)
    todo = []
    for one in plans:
        if one.error is not None:
            end(DiskResult(one.policy, one.name, "failed", error=one.error))
        elif not one.has_work:
            end(_nothing(one))
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


@dataclass(frozen=True)
class _Taking:
    """Host space that a disk under way takes.

    :ivar needed: bytes, in all.
    :ivar before: how many its image had.
    """

    space: HostSpace
    needed: int
    before: int


class _Applying:
    """Does single disks, and knows what those under way will still take of the host's space."""

    def __init__(
        self, connect: Connect, progress: Callable[[DiskPolicy, Progress], None] | None
    ) -> None:
        self._connect = connect
        self._progress = progress
        self._taking: dict[DiskPolicy, _Taking] = {}

    def disk(self, wanted: DiskPolicy) -> asyncio.Future[DiskResult]:
        """Begin with one disk; the future's result says how it ended."""
        return asyncio.ensure_future(self._tried(wanted))

    async def _tried(self, wanted: DiskPolicy) -> DiskResult:
        started = time.monotonic()
        try:
            async with self._connect(wanted.address) as vm:
                result = await self._one(await vm.disk(wanted.disk), wanted)
        except (Error, OSError) as error:
            result = DiskResult(wanted, wanted.disk, "failed", error=as_error(error))
        finally:
            self._taking.pop(wanted, None)
        return replace(result, seconds=time.monotonic() - started)

    async def _one(self, disk: Disk, wanted: DiskPolicy) -> DiskResult:
        plan = await look(disk, wanted, undo=True)  # again: hours may have passed
        assert plan.changes is not None  # look raises where it cannot say
        if not plan.has_work:
            return _nothing(plan)
        if plan.space is not None:
            plan.check_space(self._promised(plan.space.device))
            self._taking[wanted] = _Taking(plan.space, plan.needed, _used(plan.space.path))
        return await _unless_short(self._steps(disk, plan, plan.changes), plan.space)

    def _promised(self, device: int) -> int:
        """Return how much of a file system those under way will still take."""
        return sum(
            max(0, one.needed - (_used(one.space.path) - one.before))
            for one in self._taking.values()
            if one.space.device == device
        )

    async def _steps(self, disk: Disk, plan: DiskPlan, changes: Changes) -> DiskResult:
        wanted = plan.policy
        speed = Speed(wanted.speed)
        result = DiskResult(wanted, disk.name, "done", warnings=plan.warnings)
        before = 0
        for step, where in _together(changes.steps):
            tell = self._teller(wanted, step, before, changes.work)
            if step.verb == "drop" and not wanted.independent:
                async with disk.stream(base=wanted.base, speed=wanted.speed) as job:
                    async for seen in job:
                        tell(seen)
                result = replace(result, allocated=result.allocated + step.bytes)
            else:
                if step.verb == "drop":
                    done = await disk.allocate(independent=True, speed=speed, progress=tell)
                else:
                    await disk.refresh()
                    full = step.verb == "reserve"
                    done = await allocate_ranges(disk, where, full=full, speed=speed, progress=tell)
                result = replace(
                    result,
                    allocated=result.allocated + done.allocated,
                    reserved=result.reserved + done.reserved,
                    held=max(result.held, done.held),
                    warnings=tuple(dict.fromkeys((*result.warnings, *done.warnings))),
                )
            before += step.bytes
        result = replace(result, dropped=changes.leaving)
        ahead = 0
        if wanted.ahead is not None:
            size = wanted.ahead.of(disk.size) or 1
            result = replace(result, ahead=await make_room(disk, size, keep_free=wanted.keep_free))
            assert result.ahead is not None  # it was just made
            ahead = result.ahead.reserved
        if not (result.allocated or result.reserved or result.dropped or ahead):
            return replace(result, state="nothing")  # the zeros had host space: no live map tells
        return result

    def _teller(
        self, wanted: DiskPolicy, step: PlannedStep, before: int, total: int
    ) -> Callable[[Progress], None]:
        """Make what tells of the whole disk what a step tells of its phases, one by one.

        It never goes back: a stream that only drops links counts the whole disk once more.
        """
        ended = reached = 0
        last: Progress | None = None

        def tell(seen: Progress) -> None:
            nonlocal ended, reached, last
            if self._progress is None:
                return
            if last is not None and seen.phase != last.phase:
                ended += last.done
            last = seen
            if step.verb == "drop" and not wanted.independent:  # QEMU's own count
                here = int(step.bytes * seen.done / seen.total) if seen.total else 0
            else:
                here = ended + seen.done
            reached = max(reached, min(here, step.bytes))
            done = before + reached
            eta = (total - done) / seen.rate if seen.rate > 0 else None
            self._progress(wanted, replace(seen, done=done, total=total, eta=eta))

        return tell


def _together(steps: Iterable[PlannedStep]) -> Iterator[tuple[PlannedStep, Ranges]]:
    """Yield steps that are done at once, as one, each with the ranges that it is of."""
    for verb, same in groupby(steps, key=lambda step: step.verb):
        several = list(same)
        where = Ranges((step.offset, step.offset + step.length) for step in several)
        first = several[0].offset
        total = sum(step.bytes for step in several)
        yield PlannedStep(verb, first, int(where.stops[-1]) - first, total), where


def _used(path: str) -> int:
    try:
        return Path(path).stat().st_blocks * 512
    except OSError:
        return 0  # unplugged and gone, say: it takes no more


async def _unless_short(
    work: Coroutine[Any, Any, DiskResult], space: HostSpace | None
) -> DiskResult:
    """Do the work, and give it up when the host has less free than must stay so."""
    task = asyncio.ensure_future(work)
    short = False
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            if space is not None and space.keep and not space.now().leaves(0):
                short = True
                break
    finally:
        if not task.done():
            task.cancel()
            await undisturbed(asyncio.wait({task}))
    if short and task.cancelled():
        assert space is not None  # that is what was short
        raise Error(
            f"the file system of {printable(space.path)} has less than {space.keep} bytes free, "
            "which the policy keeps so",
            standing="it was given up; what was allocated by then stays, contents are as they "
            "were, and nothing of ours is left in the VM",
            remedy="make room, then apply it again: it goes on from there",
        )
    return task.result()
