"""A seeded sample of the kill matrices of copies, at the commands that change something."""

import pytest
from allocatekills import decisive
from copykills import COPIES
from killing import DEATHS, WAYS, Matrix
from rounds import rounds

pytestmark = pytest.mark.live

_KILLS = 2  # of each operation; each takes a second, and the whole operation before them two


@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    _, chance = rounds(1)
    tried = 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        points = list(decisive(matrix))
        kills = [(matrix.killed_controller, point, way) for point in points for way in WAYS[:3]]
        kills += [(matrix.killed_qemu, point, death) for point in points for death in DEATHS]
        for kill, point, how in chance.sample(kills, _KILLS):
            tried += await kill(*point, how)
    print(f"kill matrix: {tried} of {len(kills)} points, {operation}")
    assert len(kills) > 40
