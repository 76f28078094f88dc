"""A seeded sample of the kill matrices of allocation, at the commands that change something."""

import pytest
from allocatekills import ALLOCATIONS, decisive
from killing import DEATHS, Matrix
from rounds import sample

pytestmark = pytest.mark.live

_WAYS = ("undo", "carry-on", "again")


@pytest.mark.parametrize("operation", ALLOCATIONS, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    chosen, tried, total = sample(0.015), 0, 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        points = [
            (number, moment, way)
            for number, moment in decisive(matrix)
            for way in (*_WAYS, *DEATHS)
        ]
        for number, moment, way in points:
            total += 1
            if not chosen(total):
                continue
            kill = matrix.killed_qemu if way in DEATHS else matrix.killed_controller
            tried += await kill(number, moment, way)
    assert total > 40
    print(f"kill matrix: {tried} of {total} points, {operation}")
