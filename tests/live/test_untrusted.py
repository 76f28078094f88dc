"""Root beside a QEMU whose user is not to be trusted: what he puts into his directory."""

import os

import pytest
from untrusted import UID

import qmpblock

pytestmark = pytest.mark.live


@pytest.mark.scenarios("chain-3.yaml")
async def test_eve_is_who_we_need(scenario, eve, vm_dir):
    """The rest means something: her QEMU is hers, root maps it, and she cannot do what root can."""
    vm = await eve.start(scenario)
    assert os.stat(f"/proc/{vm.pid}").st_uid == UID
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert (await disk.map()).totals().layers
    secret = vm_dir / "secret"
    secret.write_text("root's")
    script = "import sys\ntry: open(sys.argv[1])\nexcept OSError as error: print(error.strerror)"
    assert eve.run(script, str(secret)) == "Permission denied\n"
