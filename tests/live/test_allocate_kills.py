"""A seeded sample of the kill matrices of allocation, at the commands that change something."""

import pytest
from allocatekills import ALLOCATIONS, decisive
from killers import kill_some
from killing import DEATHS

pytestmark = pytest.mark.live

_KILLS = 2  # of each operation; each takes a second, and the whole operation before them two


@pytest.mark.parametrize("operation", ALLOCATIONS, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    _, total = await kill_some(operation, decisive, DEATHS, _KILLS, vm_dir, qemu_binary)
    assert total > 40
