"""Policies carried out: look at the disks, say what is to be done, do it.

`plan` looks at every disk of a policy and changes nothing. `apply` looks and does, several VMs
at once, one disk of a VM at a time (it has one NBD server): each step is one that can be given
up, killed and repeated (`Disk.allocate`, `Disk.stream`, `VM.copy`), and what is to be done is
computed from the disk as it is. So `apply` can be run again at any time, and does what is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias

from qmpblock.allocation.allocate import allocate_ranges
from qmpblock.allocation.room import RoomResult, make_room
from qmpblock.cancellation import task_group, undisturbed
from qmpblock.errors import Error, RequestError, printable
from qmpblock.policy.copies import CopiesPlan, CopiesResult, look_at_copies, make_copies
from qmpblock.policy.copyentry import CopyPolicy
from qmpblock.policy.look import DiskPlan, look
from qmpblock.policy.space import Book, share_space, unless_short
from qmpblock.policy.steps import PlannedStep
from qmpblock.ranges import Ranges
from qmpblock.speed import Speed

if TYPE_CHECKING:
    from qmpblock.policy.file import DiskPolicy, Policy
    from qmpblock.policy.steps import Changes
    from qmpblock.qemu.job import Progress
    from qmpblock.vm import VM, Disk

__all__ = ["Connect", "DiskPlan", "DiskResult", "apply", "as_error", "connect_to", "plan"]

Connect = Callable[[str], AbstractAsyncContextManager["VM"]]

_AT_ONCE = 8  # VMs that are looked at

_Wish: TypeAlias = "DiskPolicy | CopyPolicy"
_Plan: TypeAlias = "DiskPlan | CopiesPlan"
_Result: TypeAlias = "DiskResult | CopiesResult"


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


async def plan(
    policy: Policy, *, connect: Connect | None = None
) -> tuple[DiskPlan | CopiesPlan, ...]:
    """Say what a policy would do, disk by disk and copy by copy, in its order. Changes nothing.

    What cannot be done says so in its plan's `error`; nothing is raised for one disk.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    """
    return share_space(await _look_at_all(policy, connect or connect_to, undo=False))


async def _look_at_all(policy: Policy, connect: Connect, *, undo: bool) -> tuple[_Plan, ...]:
    turns = asyncio.Semaphore(_AT_ONCE)
    vms: dict[str, list[_Wish]] = {}
    for wanted in policy.wishes:
        vms.setdefault(wanted.address, []).append(wanted)
    plans: dict[_Wish, _Plan] = {}

    async def look_at(address: str, wishes: list[_Wish]) -> None:
        seen: dict[str, DiskPolicy] = {}
        async with turns:
            try:
                async with connect(address) as vm:
                    for wanted in wishes:
                        plans[wanted] = await _tried(vm, wanted, seen, undo=undo)
            except Error as error:
                for wanted in wishes:
                    plans.setdefault(wanted, _impossible(wanted, error))

    async with task_group() as group:
        for address, wishes in vms.items():
            group.create_task(look_at(address, wishes))
    return tuple(plans[wanted] for wanted in policy.wishes)


async def _tried(vm: VM, wanted: _Wish, seen: dict[str, DiskPolicy], *, undo: bool) -> _Plan:
    try:
        if isinstance(wanted, CopyPolicy):
            return await look_at_copies(vm, wanted, undo=undo)
        disk = await vm.disk(wanted.disk)
        first = seen.setdefault(disk.device.qom_path, wanted)
        if first is not wanted:
            raise RequestError(
                f"{printable(wanted.disk)} is the disk that the policy calls "
                f"{printable(first.disk)}, too: {wanted.place}"
            )
        return await look(disk, wanted, undo=undo)
    except (Error, OSError) as error:
        return _impossible(wanted, as_error(error))


def _impossible(wanted: _Wish, error: Error) -> _Plan:
    if isinstance(wanted, CopyPolicy):
        return CopiesPlan(wanted, wanted.disk, error=error)
    return DiskPlan(wanted, wanted.disk, error=error)


def as_error(error: Error | OSError) -> Error:
    """Say of a file of this host that cannot be opened what an Error would."""
    return error if isinstance(error, Error) else Error(f"on this host: {printable(error)}")


def connect_to(address: str) -> AbstractAsyncContextManager[VM]:
    """Connect to a VM as `qmpblock.connect` does."""
    from qmpblock.vm import connect

    return connect(address)


def _nothing(plan: _Plan) -> _Result:
    if isinstance(plan, CopiesPlan):
        return CopiesResult(plan.policy, plan.name, "nothing", warnings=plan.warnings)
    ahead = None
    if plan.ahead is not None:
        room = plan.ahead.room
        ahead = RoomResult(
            plan.name, plan.ahead.file, plan.ahead.wanted, room, 0, room, plan.ahead.full
        )
    return DiskResult(plan.policy, plan.name, "nothing", ahead=ahead, warnings=plan.warnings)


def _failed(wanted: _Wish, name: str, error: Error) -> _Result:
    if isinstance(wanted, CopyPolicy):
        return CopiesResult(wanted, name, "failed", error=error)
    return DiskResult(wanted, name, "failed", error=error)


# -- apply


async def apply(
    policy: Policy,
    *,
    connect: Connect | None = None,
    planned: Callable[[tuple[DiskPlan | CopiesPlan, ...]], None] | None = None,
    progress: Callable[[DiskPolicy | CopyPolicy, Progress], None] | None = None,
    ended: Callable[[DiskResult | CopiesResult], None] | None = None,
) -> tuple[DiskResult | CopiesResult, ...]:
    """Do what a policy says; return what was done, disk by disk and copy by copy, in its order.

    A disk that fails does not keep the others from being done. Cancelling gives up what is
    under way, as `Disk.allocate`, `Disk.stream` and `VM.copy` do; what was done stays, and the
    next `apply` goes on from there. A copy that is there is not made again.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    :param planned: is called with what is about to be done.
    :param progress: is called with how far a disk is.
    :param ended: is called when a disk is done, or has failed.
    """
    connect = connect or connect_to
    results: dict[_Wish, _Result] = {}

    def end(result: _Result) -> None:
        results[result.policy] = result
        if ended is not None:
            ended(result)

    plans = share_space(await _look_at_all(policy, connect, undo=True))
    if planned is not None:
        planned(plans)
    todo: list[_Wish] = []
    for one in plans:
        if one.error is not None:
            end(_failed(one.policy, one.name, one.error))
        elif not one.has_work:
            end(_nothing(one))
        else:
            todo.append(one.policy)
    work = _Applying(connect, progress)
    await _in_turn(todo, policy.parallel, work.begin, end)
    return tuple(results[wanted] for wanted in policy.wishes)


async def _in_turn(
    wishes: list[_Wish],
    parallel: int,
    work: Callable[[_Wish], asyncio.Future[_Result]],
    end: Callable[[_Result], None],
) -> None:
    """Do all in order, so many at once, of each VM one at a time."""
    waiting = list(wishes)
    running: dict[asyncio.Future[_Result], str] = {}
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
    """Does single disks and copies, and knows what those under way will still take of the host."""

    def __init__(
        self, connect: Connect, progress: Callable[[_Wish, Progress], None] | None
    ) -> None:
        self._connect = connect
        self._progress = progress
        self._book = Book()

    def begin(self, wanted: _Wish) -> asyncio.Future[_Result]:
        """Begin with one disk, or one entry of copies; the future's result says how it ended."""
        return asyncio.ensure_future(self._tried(wanted))

    async def _tried(self, wanted: _Wish) -> _Result:
        started = time.monotonic()
        try:
            async with self._connect(wanted.address) as vm:
                if isinstance(wanted, CopyPolicy):
                    result = await self._copies(vm, wanted)
                else:
                    result = await self._one(await vm.disk(wanted.disk), wanted)
        except (Error, OSError) as error:
            result = _failed(wanted, wanted.disk, as_error(error))
        finally:
            self._book.end(wanted)
        return replace(result, seconds=time.monotonic() - started)

    async def _copies(self, vm: VM, wanted: CopyPolicy) -> _Result:
        plan = await look_at_copies(vm, wanted, undo=True)  # again: hours may have passed
        if not plan.has_work:
            return _nothing(plan)
        self._book.begin(wanted, plan.takes)
        return await make_copies(vm, plan, lambda seen: self._tell(wanted, seen))

    def _tell(self, wanted: _Wish, seen: Progress) -> None:
        if self._progress is not None:
            self._progress(wanted, seen)

    async def _one(self, disk: Disk, wanted: DiskPolicy) -> _Result:
        plan = await look(disk, wanted, undo=True)  # again: hours may have passed
        assert plan.changes is not None  # look raises where it cannot say
        if not plan.has_work:
            return _nothing(plan)
        self._book.begin(wanted, plan.takes)
        return await unless_short(
            self._steps(disk, plan, plan.changes),
            [one.space for one in plan.takes],
            standing="what was allocated by then stays, contents are as they were, and nothing of "
            "ours is left in the VM",
            remedy="make room, then apply it again: it goes on from there",
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
            self._tell(wanted, replace(seen, done=done, total=total, eta=eta))

        return tell


def _together(steps: Iterable[PlannedStep]) -> Iterator[tuple[PlannedStep, Ranges]]:
    """Yield steps that are done at once, as one, each with the ranges that it is of."""
    for verb, same in groupby(steps, key=lambda step: step.verb):
        several = list(same)
        where = Ranges((step.offset, step.offset + step.length) for step in several)
        first = several[0].offset
        total = sum(step.bytes for step in several)
        yield PlannedStep(verb, first, int(where.stops[-1]) - first, total), where
