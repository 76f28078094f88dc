"""A seeded sample of the kill matrices of copies, at the commands that change something."""

import pytest
from allocatekills import decisive
from copykills import COPIES, SHARED
from killers import kill_some
from killing import DEATHS, Matrix
from loopdevices import xfs

pytestmark = pytest.mark.live

_KILLS = 2  # of each operation; each takes a second, and the whole operation before them two


@pytest.mark.parametrize("operation", COPIES, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    _, total = await kill_some(operation, decisive, DEATHS, _KILLS, vm_dir, qemu_binary)
    assert total > 40


async def test_frozen_layers_whose_blocks_are_shared(vm_dir, qemu_binary):
    with xfs(vm_dir) as place:
        _, total = await kill_some(SHARED, decisive, DEATHS, _KILLS, place, qemu_binary)
    assert total > 40


async def test_a_controller_killed_while_what_is_there_is_compared(vm_dir, qemu_binary):
    """It leaves exports of a target, or of the disk and its bitmap, which keep these from going."""
    [resumed] = [one for one in COPIES if one.name == "copy-end-resumed"]
    async with Matrix(resumed, vm_dir, qemu_binary) as matrix:
        trace = enumerate(matrix.reference.trace, 1)
        added = [number for number, command in trace if command == "block-export-add"]
        for number in added[1:3]:
            assert await matrix.killed_controller(number, "after", "undo")
