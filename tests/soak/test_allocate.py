"""Allocation under stress, and its kill matrices, whole: `make soak`."""

import pytest
from allocatekills import ALLOCATIONS
from allocating import allocations_under_stress, blank
from killers import kill_controllers, kill_qemus
from killing import DEATHS, WAYS
from rounds import rounds

from qmpblock.testing.images import Tools

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", ALLOCATIONS, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_controllers(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("operation", ALLOCATIONS, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    await kill_qemus(operation, death, vm_dir, qemu_binary)


@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
async def test_allocations_under_stress(fmt, start_qemu, qemu_binary, invariant):
    count, chance = rounds(200)
    vm = await start_qemu(blank(fmt), guest=True)
    invariant.forget(vm)  # the pivots of its rounds leave QEMU's own traces
    print(await allocations_under_stress(vm, Tools.of(qemu_binary), chance, count))
