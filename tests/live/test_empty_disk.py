"""A disk of no bytes, such as an image that was never given a size: a command has nothing to do.

QEMU has devices with such images; whoever copies all disks of a VM meets them.
"""

import pytest
from chains import cli
from disturbed import nothing_of_ours

from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

SCENARIO = """\
about: A disk that has an image of no bytes.
disks:
  - {images: [{format: raw, size: 4M}]}
"""


async def test_it_is_read_and_copied(start_qemu, vm_dir, invariant):
    empty = vm_dir / "empty.raw"
    empty.touch()
    node = f"raw,node-name=none,file.driver=file,file.filename={empty}"
    device = "virtio-blk-pci,drive=none,id=none"
    scenario = parse_scenario(SCENARIO, "empty")
    vm = await start_qemu(scenario, extra=["-blockdev", node, "-device", device])
    code, _, err = await cli("copy", vm.monitor_path, f"none={vm_dir}/copy")
    assert code == 0, err
    assert (vm_dir / "copy").read_bytes() == b""
    code, out, err = await cli("export", vm.monitor_path, "none", "--", "sh", "-c", "echo $NBD_URI")
    assert (code, out.startswith("nbd+unix:///")) == (0, True), err
    await nothing_of_ours(vm)
