"""Locks in a living QEMU: exclusive across monitors, taken over from the dead once."""

import asyncio
import subprocess
import sys

import pytest

import qmpblock
from qmpblock.errors import BusyError, Error
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder

pytestmark = [pytest.mark.live, pytest.mark.scenarios("qcow2-empty.yaml")]

NAME = "qmpblock-test"


def dead_holder(run):
    code = f"from qmpblock.qemu.lock import Holder; print(Holder.me({run!r}).text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Holder.from_text(done.stdout)


async def never(holder):
    raise AssertionError(f"nothing of {holder} is to be undone")


async def objects(vm):
    return {o["name"] for o in await vm.execute("qom-list", path="/objects")}


async def test_one_of_two_monitors_wins(start_qemu, scenario):
    vm = await start_qemu(scenario)
    async with (
        qmpblock.connect(vm.monitor_path) as one,
        qmpblock.connect(vm.second_monitor_path) as two,
    ):
        await lock.acquire(one.monitor, NAME, Holder.me("a"), never, stall=1)
        with pytest.raises(BusyError, match="run a") as caught:
            await lock.acquire(two.monitor, NAME, Holder.me("b"), never, stall=0.2)
        assert "object-del" in caught.value.remedy
        waiting = asyncio.create_task(
            lock.acquire(two.monitor, NAME, Holder.me("b"), never, stall=30)
        )
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await lock.release(one.monitor, NAME)
        await waiting
        await lock.release(two.monitor, NAME)
        await lock.release(two.monitor, NAME)  # idempotent
    assert NAME not in await objects(vm)


async def test_the_dead_are_undone_exactly_once(start_qemu, scenario):
    vm = await start_qemu(scenario)
    undone, inside = [], []
    dead = dead_holder("dead")
    async with (
        qmpblock.connect(vm.monitor_path) as one,
        qmpblock.connect(vm.second_monitor_path) as two,
    ):
        await lock._add(one.monitor, [NAME], dead)

        async def undo(holder):
            undone.append(holder)
            await asyncio.sleep(0.1)

        async def take(controller, run):
            await lock.acquire(controller.monitor, NAME, Holder.me(run), undo, stall=30)
            inside.append(run)
            assert len(inside) == 1
            await asyncio.sleep(0.02)
            inside.remove(run)
            await lock.release(controller.monitor, NAME)

        await asyncio.gather(*(take((one, two)[n % 2], f"run{n}") for n in range(6)))
    assert undone == [dead]
    assert not {name for name in await objects(vm) if name.startswith(NAME)}


async def test_one_that_died_while_undoing_is_undone_too(start_qemu, scenario):
    vm = await start_qemu(scenario)
    undone = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        first, second = dead_holder("first"), dead_holder("second")
        await lock._add(controller.monitor, [NAME], first)
        await lock._add(controller.monitor, [f"{NAME}-undo-first"], second)

        async def undo(holder):
            undone.append(holder.run)

        await lock.acquire(controller.monitor, NAME, Holder.me("r"), undo, stall=5)
        await lock.release(controller.monitor, NAME)
    assert "first" in undone
    assert not {name for name in await objects(vm) if name.startswith(NAME)}


async def test_when_undoing_fails_the_lock_stays_for_the_next(start_qemu, scenario):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        await lock._add(controller.monitor, [NAME], dead_holder("dead"))

        async def fail(holder):
            raise Error("cannot")

        with pytest.raises(Error, match="cannot"):
            await lock.acquire(controller.monitor, NAME, Holder.me("r"), fail, stall=5)
        assert {name for name in await objects(vm) if name.startswith(NAME)} == {NAME}
        await lock.release(controller.monitor, NAME)


async def test_an_object_that_is_not_ours_is_never_taken_over(start_qemu, scenario):
    vm = await start_qemu(scenario)
    await vm.execute("object-add", qom_type="secret", id=NAME, data="somebody's")
    async with qmpblock.connect(vm.monitor_path) as controller:
        with pytest.raises(BusyError, match="not of ours"):
            await lock.acquire(controller.monitor, NAME, Holder.me("r"), never, stall=0.2)
    await vm.execute("object-del", id=NAME)
