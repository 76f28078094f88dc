"""An allocator: many ranges, one after another, through one export."""

import asyncio
import random
import time

import pytest
from allocating import content
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.allocation.plan import below
from qmpblock.errors import BusyError, GraphError, RangeError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_acknowledged

pytestmark = pytest.mark.live

KIB, MIB = 1 << 10, 1 << 20
RANGE = 64 * KIB
BACKED = "about: To allocate.\nimages: [{size: 64M, content: [write 0 32M 0xaa]}, {}]\n"
STRESS = StressSpec(
    offset=8 * MIB, blocks=1024, block_size=4096, queue_depth=8, seed=7, flush_every=50
)


async def started(start_qemu, vm_dir, qemu_binary, **options):
    built = await build(parse_scenario(BACKED, "thin"), vm_dir / "images", Tools.of(qemu_binary))
    before = await content(built.disks[0].active, built.tools)
    return await start_qemu(built, guest=True, **options), built, before


async def test_ranges_that_the_guest_writes_to(start_qemu, vm_dir, qemu_binary, invariant):
    vm, built, before = await started(start_qemu, vm_dir, qemu_binary)
    places = random.Random(3).sample(range(4 * MIB, 16 * MIB, RANGE), 96)
    await vm.guest.stress(STRESS)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.allocator() as allocator:
            found = [await allocator.allocate(place, RANGE) for place in places[:48]]
            found += await asyncio.gather(*(allocator.allocate(at, RANGE) for at in places[48:]))
            odd = await allocator.allocate(20 * MIB + 1, 10)
            again = await allocator.allocate(20 * MIB, RANGE)
            with pytest.raises(RangeError):
                await allocator.allocate(63 * MIB, 2 * MIB)
            blank = await allocator.allocate(40 * MIB, RANGE)
        await nothing_of_ours(vm)
        seen = await disk.map()
    assert [(one.offset, one.allocated + one.already) for one in found] == [
        (place, RANGE) for place in places
    ]
    assert sum(one.allocated for one in found) > 0
    assert (odd.rounded_offset, odd.rounded_length, odd.allocated) == (20 * MIB, RANGE, RANGE)
    assert (again.allocated, again.already) == (0, RANGE)
    assert (blank.allocated, blank.already) == (0, 0)
    for place in (*places, 20 * MIB):
        assert below(seen.clip(place, RANGE)).total == 0
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    await vm.quit()
    after = await content(built.disks[0].active, built.tools)
    area = slice(STRESS.offset, STRESS.offset + STRESS.length)
    verdict = check_acknowledged(after[area], STRESS, done.acked, done.issued, background=0xAA)
    assert verdict.ok, verdict
    assert after[: area.start] == before[: area.start]
    assert after[area.stop :] == before[area.stop :]


async def test_it_costs_a_fraction_of_single_calls(start_qemu, vm_dir, qemu_binary, invariant):
    """Forty times as many were measured; a busy host is allowed something."""
    vm, *_ = await started(start_qemu, vm_dir, qemu_binary)
    places = iter(range(0, 32 * MIB, RANGE))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        began = time.monotonic()
        for place in [next(places) for _ in range(20)]:
            await disk.allocate(place, RANGE)
        alone = (time.monotonic() - began) / 20
        began = time.monotonic()
        async with disk.allocator() as allocator:
            for place in [next(places) for _ in range(200)]:
                assert (await allocator.allocate(place, RANGE)).allocated == RANGE
        together = (time.monotonic() - began) / 200
    assert together < alone / 5, (together, alone)


async def test_while_it_is_open_nobody_else_of_ours_changes_the_disk(
    start_qemu, vm_dir, qemu_binary, invariant
):
    vm, *_ = await started(start_qemu, vm_dir, qemu_binary)
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        qmpblock.connect(vm.second_monitor_path) as other,
    ):
        [disk], [theirs] = await controller.disks(), await other.disks()
        async with disk.allocator() as allocator:
            with pytest.raises(BusyError):
                await theirs.allocate(0, RANGE)
            call = asyncio.create_task(allocator.allocate(0, 16 * MIB))
            await asyncio.sleep(0.02)
            call.cancel()
            await asyncio.wait([call])
            assert (await allocator.allocate(16 * MIB, RANGE)).allocated == RANGE
        assert (await theirs.allocate(17 * MIB, RANGE)).allocated == RANGE
    await nothing_of_ours(vm)


@pytest.mark.parametrize("calls", [0, 3], ids=["on-leaving", "by-a-call"])
async def test_a_foreign_snapshot_is_noticed(calls, start_qemu, vm_dir, qemu_binary, invariant):
    """The export follows it, silently; at the latest on leaving it is said."""
    vm, built, _ = await started(start_qemu, vm_dir, qemu_binary)
    foreign = str(vm_dir / "foreign.qcow2")
    await built.tools.run(built.tools.img, "create", "-q", "-f", "qcow2", foreign, "64M")
    noticed = []

    async def work(disk):
        async with disk.allocator() as allocator:
            await allocator.allocate(0, RANGE)
            node = {"driver": "file", "filename": foreign}
            await vm.execute(
                "blockdev-add", driver="qcow2", node_name="foreign", file=node, backing=None
            )
            await vm.execute("blockdev-snapshot", node="d0", overlay="foreign")
            for number in range(calls):
                await asyncio.sleep(0.21)
                try:
                    await allocator.allocate((number + 1) * RANGE, RANGE)
                except GraphError:
                    noticed.append(number)
                    raise

    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(GraphError, match="somebody took a snapshot"):
            await work(disk)
    assert noticed == ([0] if calls else [])
    await nothing_of_ours(vm)
    invariant.forget(vm)  # it has another chain now
