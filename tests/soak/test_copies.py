"""Kill matrices of copies, whole: `make soak`."""

import pytest
from copykills import COPIES, SHARED
from killers import kill_controllers, kill_qemus, kill_recoveries
from killing import DEATHS, WAYS
from loopdevices import xfs

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_controllers(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("way", ["undo"])
@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_a_recovery_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_recoveries(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    await kill_qemus(operation, death, vm_dir, qemu_binary)


@pytest.mark.parametrize("way", WAYS)
async def test_a_controller_of_shared_blocks_killed_at_every_command(way, vm_dir, qemu_binary):
    with xfs(vm_dir) as place:
        await kill_controllers(SHARED, way, place, qemu_binary)


@pytest.mark.parametrize("death", DEATHS)
async def test_qemu_killed_at_every_command_of_shared_blocks(death, vm_dir, qemu_binary):
    with xfs(vm_dir) as place:
        await kill_qemus(SHARED, death, place, qemu_binary)
