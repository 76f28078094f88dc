"""A node of ours over one that a guest is at work on in an iothread."""

import pytest
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.errors import DisconnectedError
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.joint import Joint
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

MIB = 1 << 20
BUSY = StressSpec(
    offset=8 * MIB, blocks=512, block_size=4096, queue_depth=8, seed=5, flush_every=50
)
DATA_FILE = """\
about: An overlay whose data is in a file of its own, in an iothread.
images:
  - {size: 64M, content: [write 32M 16M 0xaa]}
  - {data_file: data}
attach: {iothread: one}
"""


async def busy(start_qemu, vm_dir, qemu_binary, text):
    built = await build(parse_scenario(text, "busy"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(BUSY)
    return vm, built


async def at_ease(vm):
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0


async def test_a_thin_allocation_into_a_data_file(start_qemu, vm_dir, qemu_binary, invariant):
    """A node of ours holds the write permission there: added directly, QEMU 7.2 aborted."""
    vm, built = await busy(start_qemu, vm_dir, qemu_binary, DATA_FILE)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for part in range(4):
            result = await disk.allocate(32 * MIB + part * 4 * MIB, 4 * MIB)
            assert result.allocated == 4 * MIB
    await at_ease(vm)
    await nothing_of_ours(vm)
    await vm.quit()
    await built.disks[0].active.check(built.tools)


ONE = "about: A disk.\nimages: [{size: 64M}]\nattach: {iothread: one}\n"


async def test_a_joint_is_put_on_it_again_and_again(start_qemu, vm_dir, qemu_binary, invariant):
    vm, _ = await busy(start_qemu, vm_dir, qemu_binary, ONE)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        joint = Joint(controller.monitor, "qmpblock-00000000-joint")
        for _ in range(20):
            await joint.add(disk.size)
            await joint.put_on("d0", disk.device)
            await joint.remove()
    await at_ease(vm)


async def test_which_qemu_does_not_survive_it_otherwise(start_qemu, vm_dir, qemu_binary, invariant):
    """So that the one above can fail, and the capability is true."""
    vm, _ = await busy(start_qemu, vm_dir, qemu_binary, ONE)
    breaks = Capabilities(vm.version).adding_over_iothreads_aborts
    if breaks:
        vm.expect_exit()
        invariant.forget(vm)
    died = False
    try:
        for _ in range(40):
            await vm.execute("blockdev-add", driver="raw", node_name="r", file="d0")
            await vm.execute("blockdev-del", node_name="r")
    except DisconnectedError:
        died = True
        await vm.wait(30)  # its last word is not its end
    assert died == breaks
