"""Kill matrices of copies, whole: `make soak`."""

import pytest
from copykills import COPIES
from killing import DEATHS, WAYS, Matrix
from rounds import slice_of_soak

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_a_controller_killed_at_every_command(operation, way, vm_dir, qemu_binary):
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        for number, moment in matrix.points(slow=way.endswith("-slow")):
            total += 1
            if chosen(total):
                tried += await matrix.killed_controller(number, moment, way)
    print(f"kill matrix: {tried} of {total} points, {operation}, then {way}")


@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_a_recovery_killed_at_every_command(operation, vm_dir, qemu_binary):
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        for first in matrix.representative():
            trace = await matrix.recovery_trace(first, "undo")
            for number in range(1, len(trace) + 1):
                for moment in ("before", "after"):
                    total += 1
                    if chosen(total):
                        tried += await matrix.killed_recovery(first, number, moment, "undo")
    print(f"kill matrix: {tried} of {total} points, recovery of {operation}")


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_qemu_killed_at_every_command(operation, death, vm_dir, qemu_binary):
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        for number, moment in matrix.points():
            total += 1
            if chosen(total):
                tried += await matrix.killed_qemu(number, moment, death)
    print(f"kill matrix: {tried} of {total} points, {operation}, QEMU killed ({death})")
