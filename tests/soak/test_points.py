"""Points in time: many readers at once, and kill matrices, whole: `make soak`."""

import asyncio

import pytest
from fleecing import MIB, SPEC, begin_writing, read_out, read_plainly
from killers import kill_controllers, kill_qemus, kill_recoveries
from killing import DEATHS, WAYS
from pointing import DISKS, at_ease, taken
from pointkills import POINTS
from rounds import rounds

import qmpblock
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import check_point_in_time

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("operation", POINTS, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_controllers(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("way", ["undo", "carry-on"])
@pytest.mark.parametrize("operation", POINTS, ids=str)
async def test_a_recovery_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_recoveries(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("death", DEATHS[:2])
@pytest.mark.parametrize("operation", POINTS, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    await kill_qemus(operation, death, vm_dir, qemu_binary)


@pytest.mark.parametrize("name", ["raw", "chain"])
async def test_whoever_reads_while_the_guest_writes(name, start_qemu, vm_dir, invariant):
    """By block status or without it, in small requests and in large ones (K37)."""
    count, _ = rounds(15)
    vm = await start_qemu(parse_scenario(DISKS[name], "disk"), guest=True)
    await begin_writing(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for _ in range(count):
            copies = {vm_dir / "a": "qemu-img", vm_dir / "b": "nbdcopy", vm_dir / "c": "nbdcopy"}
            async with taken(vm, disk) as (point, bounds):
                found = await asyncio.gather(
                    *(_plainly(point, step) for step in (3 * MIB + 512, 100 << 10)),
                    *(read_out(copy, point.uri, program) for copy, program in copies.items()),
                )
            for data in (*found[:2], *(copy.read_bytes() for copy in copies)):
                result = check_point_in_time(data[: 16 * MIB], SPEC, bounds)
                assert result.ok, result
    await at_ease(vm)


async def _plainly(point, step):
    parts = [
        await read_plainly(point.socket, point.export, start, min(step, point.size - start))
        for start in range(0, point.size, step)
    ]
    return b"".join(parts)
