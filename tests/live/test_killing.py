"""A seeded sample of the kill matrices that tests/soak runs whole."""

import pytest
from killers import changing, kill_some_recoveries
from killing import DEATHS, OPERATIONS, WAYS, Matrix
from rounds import rounds

pytestmark = pytest.mark.live

_KILLS = 3  # of each operation; each takes a second


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
async def test_killed_at_any_command(operation, vm_dir, qemu_binary):
    _, chance = rounds(1)
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        points = changing(matrix)
        kills = [(matrix.killed_controller, point, way) for point in points for way in WAYS[:3]]
        kills += [(matrix.killed_qemu, point, death) for point in points for death in DEATHS]
        for slow in WAYS[3:]:
            slowed = matrix.points(slow=True)
            kills += [(matrix.killed_controller, point, slow) for point in slowed]
        tried = 0
        for kill, point, how in chance.sample(kills, _KILLS):
            tried += await kill(*point, how)
    print(f"kill matrix: {tried} of {len(kills)} points, operation {operation}")
    assert tried > 0  # of a job that needs less polls than when it was counted, a late one ends


async def test_a_recovery_killed_at_any_command(vm_dir, qemu_binary):
    await kill_some_recoveries(OPERATIONS, _KILLS, vm_dir, qemu_binary)
