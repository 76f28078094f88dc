"""Kill matrices, whole: `make soak`."""

import pytest
from killers import kill_controllers, kill_qemus, kill_recoveries
from killing import DEATHS, OPERATIONS, WAYS

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_controllers(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("way", ["undo", "carry-on"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
async def test_a_recovery_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_recoveries(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    await kill_qemus(operation, death, vm_dir, qemu_binary)
