"""A seeded sample of the kill matrices of points in time."""

import pytest
from killers import changing, kill_some, kill_some_recoveries
from killing import DEATHS
from pointkills import POINTS

pytestmark = pytest.mark.live

_KILLS = 6  # of each operation; each takes a second


@pytest.mark.parametrize("operation", POINTS, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    tried, _ = await kill_some(operation, changing, DEATHS[:2], _KILLS, vm_dir, qemu_binary)
    assert tried > 0


async def test_a_recovery_killed_at_any_command(vm_dir, qemu_binary):
    await kill_some_recoveries(POINTS[:3], _KILLS, vm_dir, qemu_binary)
