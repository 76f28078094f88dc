"""A seeded sample of the kill matrices of backups, at the commands that change something."""

import pytest
from backupkills import BACKUPS
from killers import changing, kill_some
from killing import DEATHS

pytestmark = pytest.mark.live

_KILLS = 2  # of each operation; each takes a second or two, and the whole operation before them two


@pytest.mark.parametrize("operation", BACKUPS, ids=str)
async def test_a_controller_or_qemu_killed_at_any_command(operation, vm_dir, qemu_binary):
    tried, _ = await kill_some(operation, changing, DEATHS[:2], _KILLS, vm_dir, qemu_binary)
    assert tried > 0
