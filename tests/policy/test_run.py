"""Policies carried out, without a VM: turns, shares of the host's space, holes of files."""

import asyncio
from dataclasses import replace

import pytest

from qmpblock.allocation.room import RoomPlan
from qmpblock.errors import Error
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.host.space import HostSpace
from qmpblock.policy.file import DiskPolicy
from qmpblock.policy.run import DiskPlan, DiskResult, _Applying, _in_turn, _nothing
from qmpblock.policy.space import share_space
from qmpblock.policy.steps import Changes, Picture, PlannedStep
from qmpblock.qemu.job import Progress

M = 1 << 20


def wish(address, disk="d"):
    return DiskPolicy(address, disk)


class Work:
    """Disks that are done when the test says so."""

    def __init__(self):
        self.begun = []
        self.futures = {}
        self.cancelled = []

    def __call__(self, wanted):
        self.begun.append(wanted.disk)

        async def work():
            try:
                return await self.futures.setdefault(
                    wanted.disk, asyncio.get_running_loop().create_future()
                )
            except asyncio.CancelledError:
                self.cancelled.append(wanted.disk)
                raise

        return asyncio.ensure_future(work())

    async def end(self, disk):
        await asyncio.sleep(0)
        self.futures[disk].set_result(DiskResult(wish("x", disk), disk, "done"))
        for _ in range(5):
            await asyncio.sleep(0)


async def test_disks_take_turns_in_order_and_one_of_a_vm_at_a_time():
    work, ended = Work(), []
    disks = [wish("a", "1"), wish("a", "2"), wish("b", "3"), wish("c", "4")]
    task = asyncio.ensure_future(_in_turn(disks, 2, work, lambda done: ended.append(done.name)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert work.begun == ["1", "3"]  # 2 is of the VM that 1 is of
    await work.end("3")
    assert work.begun == ["1", "3", "4"]
    await work.end("1")
    assert work.begun == ["1", "3", "4", "2"]
    await work.end("2")
    await work.end("4")
    await task
    assert ended == ["3", "1", "2", "4"]


async def test_cancelled_all_that_is_under_way_is_waited_for():
    work = Work()
    disks = [wish("a", "1"), wish("b", "2"), wish("c", "3")]
    task = asyncio.ensure_future(_in_turn(disks, 2, work, lambda done: None))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.begun == work.cancelled == ["1", "2"]


def planned(name, device, needed, *, free=100, keep=10, steps=1):
    today = Picture((name,), (AllocationMap.uniform(0, 10),))
    changes = Changes((PlannedStep("reserve", 0, 10, needed),) * steps, today, reserve=needed)
    space = HostSpace("/image", device, free, keep)
    return DiskPlan(wish("a", name), name, today, changes, needed, space)


def test_space_is_given_to_the_disks_in_their_order():
    plans = (
        planned("1", 1, 50),
        planned("2", 1, 41),  # 50 + 41 + 10 that stay free: one too many
        planned("3", 1, 40),
        planned("4", 2, 90),  # another file system
        planned("5", 1, 999, steps=0),  # needs nothing
    )
    shared = share_space(plans)
    assert [one.error is None for one in shared] == [True, False, True, True, True]
    assert "50 are promised" in str(shared[1].error)
    failed = replace(plans[0], error=Error("no"))
    assert share_space((failed, planned("2", 1, 90)))[1].error is None


def test_room_ahead_takes_its_share_too():
    only_ahead = replace(planned("1", 1, 60, steps=0), ahead=RoomPlan("/image", 60, 0, 60, False))
    there = replace(planned("2", 1, 999, steps=0), ahead=RoomPlan("/image", 60, 60, 0, False))
    assert only_ahead.has_work
    assert not there.has_work
    shared = share_space((only_ahead, there, planned("3", 1, 31)))
    assert [one.error is None for one in shared] == [True, True, False]
    result = _nothing(there)
    assert (result.state, result.ahead.before, result.ahead.room) == ("nothing", 60, 60)
    assert _nothing(planned("4", 1, 0, steps=0)).ahead is None


def told(wanted, step, before, total, news):
    """Return what is told of the disk when a step tells (phase, done, total)."""
    seen = []
    work = _Applying(None, lambda _, progress: seen.append((progress.done, progress.eta)))
    tell = work._teller(wanted, step, before, total)
    for phase, done, whole in news:
        tell(Progress("running", phase, done, whole, rate=10.0))
    return seen


def test_progress_is_of_the_whole_disk_and_never_goes_back():
    step = PlannedStep("reserve", 0, 100, 60)
    news = [("allocating", 0, 20), ("allocating", 20, 20), ("reserving", 10, 40)]
    news += [("reserving", 40, 40), ("finishing", 999, 999)]
    assert told(wish("a"), step, 40, 200, news) == [
        (40, 16.0),
        (60, 14.0),
        (70, 13.0),
        (100, 10.0),
        (100, 10.0),
    ]
    # QEMU counts a stream in its own way: what counts is the share.
    step = PlannedStep("drop", 0, 100, 60)
    news = [("copying", 0, 1000), ("copying", 500, 1000), ("copying", 400, 2000)]
    base = replace(wish("a"), base="b")
    assert [done for done, _ in told(base, step, 0, 60, news)] == [0, 30, 30]
