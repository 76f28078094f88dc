"""A seeded sample of the kill matrices of copies, at the commands that change something."""

import pytest
from allocatekills import decisive
from copykills import COPIES, SHARED
from killers import kill_some
from killing import DEATHS
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
