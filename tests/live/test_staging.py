"""The staged commit, disturbed: writes at the worst moments, interrupts, full file systems."""

import asyncio

import pytest
from allocating import at_command, blank, content
from disturbed import nothing_of_ours

import qmpblock
from qmpblock import staging
from qmpblock.testing.images import Tools, build
from qmpblock.testing.stamps import StressSpec, check_acknowledged

pytestmark = pytest.mark.live

MIB = 1 << 20
AT = 8 * MIB  # where nothing is
PLACES = 48  # of a MiB each, from there on
STRESS = StressSpec(
    offset=AT, blocks=2048, block_size=4096, queue_depth=8, seed=5, flush_every=50, read_percent=20
)


async def one_disk(start_qemu, vm_dir, qemu_binary, scenario=None, **options):
    built = await build(scenario or blank(), vm_dir / "images", Tools.of(qemu_binary))
    before = await content(built.disks[0].active, built.tools)
    vm = await start_qemu(built, guest=True, **options)
    return vm, built, bytearray(before)


async def holds(vm, built, expected):
    """End the VM; its image holds exactly this, and is sound."""
    await nothing_of_ours(vm)
    await vm.quit()
    active = built.disks[0].active
    found = await content(active, built.tools)
    assert found == bytes(expected)
    await active.check(built.tools)


def writing_before_the_freeze(monkeypatch, vm, at, length, byte):
    """Have the guest write between the plan and the freeze, the latest moment there is."""
    real = staging.take

    async def take(*arguments):
        await vm.guest.fill(0, at, length, byte)
        await real(*arguments)

    monkeypatch.setattr(staging, "take", take)


async def test_a_write_between_plan_and_freeze_is_kept(
    start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    writing_before_the_freeze(monkeypatch, vm, AT + MIB, 2 * MIB, 0x77)
    expected[AT + MIB : AT + 3 * MIB] = b"\x77" * (2 * MIB)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(AT, 8 * MIB, full=True)
        assert result.reserved == 6 * MIB
    await holds(vm, built, expected)


async def test_a_map_from_before_the_freeze_would_lose_it(
    start_qemu, vm_dir, qemu_binary, monkeypatch
):
    """So the test above can fail: with the ranges chosen on the live disk, the write is gone."""
    vm, built, _ = await one_disk(start_qemu, vm_dir, qemu_binary)
    writing_before_the_freeze(monkeypatch, vm, AT + MIB, 2 * MIB, 0x77)
    early = []
    find_next = staging._next

    async def plan(disk, position, stop):
        early.append((await disk.map(position, stop - position)).holes())
        return await find_next(disk, position, stop)

    async def choose(*_):
        return early[0]

    monkeypatch.setattr(staging, "_next", plan)
    monkeypatch.setattr(staging, "_choose", choose)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        await disk.allocate(AT, 8 * MIB, full=True)
    await vm.quit()
    found = await content(built.disks[0].active, built.tools)
    assert found[AT + MIB : AT + 3 * MIB] == bytes(2 * MIB)


async def was_cancelled(work):
    """Whether a task ended by being cancelled; its error, if it has one, is raised."""
    await asyncio.wait([work])
    if work.cancelled():
        return True
    work.result()
    return False


async def blank_again(vm):
    """Have the guest give back what was reserved, between two stress runs."""
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    await vm.guest.discard(0, AT, PLACES * MIB)
    await vm.guest.stress(STRESS)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_interrupt_at_any_command_brings_the_overlay_home(
    moment, start_qemu, vm_dir, qemu_binary, invariant
):
    """As Ctrl-C does, at every command in turn, while the guest writes to what is reserved."""
    vm, built, expected = await one_disk(start_qemu, vm_dir, qemu_binary)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        await vm.guest.stress(STRESS)
        number, interrupted = 0, True
        while interrupted:
            number += 1
            place = number % PLACES
            if place == 0:
                await blank_again(vm)
            work = asyncio.ensure_future(disk.allocate(AT + place * MIB, MIB, full=True))
            with at_command(controller.monitor, number, work.cancel, moment) as trace:
                interrupted = await was_cancelled(work)
            assert "stop" not in trace
            await disk.refresh()
            assert [layer.node.name for layer in disk.chain.layers] == ["d0", "d0-1"], trace
            assert disk.device.jobs == (), trace
            await nothing_of_ours(vm)
        assert number > 20
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    await vm.quit()
    found = await content(built.disks[0].active, built.tools)
    area = slice(STRESS.offset, STRESS.offset + STRESS.length)
    verdict = check_acknowledged(found[area], STRESS, done.acked, done.issued)
    assert verdict.ok, verdict
    assert found[: area.start] == expected[: area.start]
    assert found[area.stop :] == expected[area.stop :]
    await built.disks[0].active.check(built.tools)
