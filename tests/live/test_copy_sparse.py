"""Copies of disks that are large and hold next to nothing: no job goes over what is not there."""

import subprocess

import pytest

import qmpblock
from qmpblock.testing.images import Tools
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

HUGE = "about: A large disk.\nimages: [{size: 2T, content: [write 1T 64K 0xaa]}]\n"


@pytest.mark.parametrize(
    "at",
    [
        "end",
        # From there on a view is copied, of which QEMU tells nothing as not allocated.
        pytest.param("start", marks=pytest.mark.needs_qemu("< 10.0", reason="copies a view")),
    ],
)
async def test_it_takes_what_it_holds(at, start_qemu, vm_dir, qemu_binary):
    """QEMU's progress is of what is to be copied, and not of the whole disk."""
    vm = await start_qemu(parse_scenario(HUGE, "huge"))
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.copy(target, at=at, format="qcow2") as job:
            pass
    assert job.result.disks[0].size == 2 << 40
    assert 64 << 10 <= job.result.disks[0].copied <= 1 << 20
    await vm.quit()
    tools = Tools.of(qemu_binary)
    source = vm.disks[0].active.path
    command = [tools.img, "compare", "-f", "qcow2", "-F", "qcow2", str(source), str(target)]
    subprocess.run(command, check=True)
