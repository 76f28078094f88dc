"""Allocation under stress, and its kill matrices, whole: `make soak`."""

import pytest
from allocatekills import ALLOCATIONS
from allocating import allocations_under_stress, blank
from killing import DEATHS, WAYS, Matrix
from rounds import rounds, slice_of_soak

from qmpblock.testing.images import Tools

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", ALLOCATIONS, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        for number, moment in matrix.points(slow=way.endswith("-slow")):
            total += 1
            if chosen(total):
                tried += await matrix.killed_controller(number, moment, way)
    print(f"kill matrix: {tried} of {total} points, {operation}, then {way}")


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("operation", ALLOCATIONS, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        for number, moment in matrix.points():
            total += 1
            if chosen(total):
                tried += await matrix.killed_qemu(number, moment, death)
    print(f"kill matrix: {tried} of {total} points, {operation}, QEMU killed ({death})")


@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
async def test_allocations_under_stress(fmt, start_qemu, qemu_binary, invariant):
    count, chance = rounds(200)
    vm = await start_qemu(blank(fmt), guest=True)
    invariant.forget(vm)  # the pivots of its rounds leave QEMU's own traces
    print(await allocations_under_stress(vm, Tools.of(qemu_binary), chance, count))
