"""An allocator: many ranges, one after another, through one export."""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import time

import pytest
from allocating import content
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.allocation.plan import below
from qmpblock.errors import BusyError, DisconnectedError, GraphError, NBDError, RangeError
from qmpblock.export.session import Request, exports
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


def apart(built):
    """Return QEMU's options for a disk each of whose files is a node of its own."""
    found = []
    for depth, image in reversed(list(enumerate(built.disks[0].active.chain()))):
        file = {"driver": "file", "node-name": f"f{depth}", "filename": str(image.path)}
        node = {"driver": "qcow2", "node-name": f"d{depth}", "file": f"f{depth}"}
        node |= {"backing": f"d{depth + 1}"} if image.backing else {}
        found += ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
    return [*found, "-device", "virtio-blk-pci,drive=d0,id=vd0"]


async def freeze(vm, directory, tools):
    """Take a snapshot, as somebody else would."""
    foreign = str(directory / "foreign.qcow2")
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", foreign, "64M")
    node = {"driver": "file", "filename": foreign}
    await vm.execute("blockdev-add", driver="qcow2", node_name="foreign", file=node, backing=None)
    await vm.execute("blockdev-snapshot", node="d0", overlay="foreign")


@pytest.mark.parametrize("calls", [0, 3], ids=["on-leaving", "by-a-call"])
async def test_a_foreign_snapshot_is_noticed(calls, start_qemu, vm_dir, qemu_binary, invariant):
    """The export follows it, silently; at the latest on leaving it is said."""
    vm, built, _ = await started(start_qemu, vm_dir, qemu_binary)
    noticed = []

    async def work(disk):
        async with disk.allocator() as allocator:
            await allocator.allocate(0, RANGE)
            await freeze(vm, vm_dir, built.tools)
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


SHORT = """
about: A middle layer that hides what lies below by being short.
images: [{size: 64M, content: [write 0 64M 0xaa]}, {size: 32M}, {size: 64M}]
"""


@contextlib.asynccontextmanager
async def frozen_before(export, vm, directory, tools):
    """Connect a controller before whose export of that number somebody takes a snapshot."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        real, exports = controller.monitor._execute, itertools.count(1)

        async def execute(*arguments):
            if arguments[-2] == "block-export-add" and next(exports) == export:
                await freeze(vm, directory, tools)
            return await real(*arguments)

        controller.monitor._execute = execute
        yield controller
    assert next(exports) > export


async def test_a_foreign_snapshot_in_the_last_moment(start_qemu, vm_dir, qemu_binary, invariant):
    """QEMU aborts where it is to copy up into an image that is frozen (K43)."""
    built = await build(parse_scenario(BACKED, "thin"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu([], guest=True, extra=apart(built))
    await vm.guest.stress(STRESS)
    async with frozen_before(1, vm, vm_dir, built.tools) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(GraphError, match="somebody took a snapshot"):
            await disk.allocate(0, RANGE)
    await nothing_of_ours(vm)
    invariant.forget(vm)  # it has another chain now
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0


@pytest.mark.parametrize("export", [1, 2, 3, 4])
async def test_a_foreign_snapshot_as_a_short_layer_goes(
    export, start_qemu, vm_dir, qemu_binary, invariant
):
    """What it hides is made explicit, or it stays: whenever somebody takes a snapshot."""
    built = await build(parse_scenario(SHORT, "short"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu([], guest=True, extra=apart(built))
    async with frozen_before(export, vm, vm_dir, built.tools) as controller:
        disk = await controller.disk("vd0")
        with contextlib.suppress(GraphError):
            async with disk.stream(base="@2"):
                pass
    await nothing_of_ours(vm)
    invariant.forget(vm)  # it has another chain now
    path = "/machine/peripheral/vd0/virtio-backend"
    for byte, offset in ((0xAA, 0), (0, 32), (0, 63)):
        await vm.qemu_io_at(path, f"read -P {byte} {offset}M 1M")


async def test_what_is_frozen_nobody_may_copy_up_into(start_qemu, vm_dir, qemu_binary, invariant):
    """So that the one above can fail, and the fact is true (K43)."""
    built = await build(parse_scenario(BACKED, "thin"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu([], extra=apart(built))
    vm.expect_exit()
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        await freeze(vm, vm_dir, built.tools)
        with contextlib.suppress(DisconnectedError):  # as the export is to end
            async with exports(controller.monitor, disk.device, [Request("d0")]) as [client]:
                with pytest.raises(NBDError):
                    await client.cache(0, RANGE)
        assert await vm.wait(30) == -signal.SIGABRT
