"""Kill matrices of backups, whole: `make soak`."""

import pytest
from backupkills import BACKUPS
from killers import kill_controllers, kill_qemus, kill_recoveries, recover_by_two
from killing import DEATHS, WAYS

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", BACKUPS, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_controllers(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("operation", BACKUPS, ids=str)
async def test_a_recovery_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    await kill_recoveries(operation, way, vm_dir, qemu_binary)


@pytest.mark.parametrize("ways", [("undo", "carry-on"), ("undo", "again")], ids="-".join)
@pytest.mark.parametrize("operation", BACKUPS, ids=str)
async def test_two_go_on_at_once(operation, ways, vm_dir, qemu_binary):
    await recover_by_two(operation, ways, vm_dir, qemu_binary)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("operation", BACKUPS, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    await kill_qemus(operation, death, vm_dir, qemu_binary)
