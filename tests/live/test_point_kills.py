"""A seeded sample of the kill matrices of points in time."""

import pytest
from killing import DEATHS, MOMENTS, WAYS, Matrix
from pointkills import POINTS
from rounds import rounds

pytestmark = pytest.mark.live

_KILLS = 6  # of each operation; each takes a second


@pytest.mark.parametrize("operation", POINTS, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    _, chance = rounds(1)
    tried = 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        points = [point for point in matrix.points() if point[0] >= matrix.first_change]
        kills = [(matrix.killed_controller, point, way) for point in points for way in WAYS[:3]]
        kills += [(matrix.killed_qemu, point, death) for point in points for death in DEATHS[:2]]
        for kill, point, how in chance.sample(kills, _KILLS):
            tried += await kill(*point, how)
    print(f"kill matrix: {tried} of {len(kills)} points, {operation}")
    assert tried > 0


async def test_a_recovery_killed_at_any_command(vm_dir, qemu_binary):
    _, chance = rounds(1)
    operation, way = chance.choice(POINTS[:3]), chance.choice(["undo", "carry-on"])
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        first = chance.choice(matrix.representative())
        trace = await matrix.recovery_trace(first, way)
        for _ in range(_KILLS):
            number = chance.randint(1, len(trace))
            await matrix.killed_recovery(first, number, chance.choice(MOMENTS), way)
    print(f"kill matrix: {_KILLS} of {2 * len(trace)} points, recovery ({way}) of {operation}")
