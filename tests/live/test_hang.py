"""A guest that does not go on: the harness says why, instead of a bare timeout."""

import asyncio
import subprocess

import pytest

from qmpblock.errors import StalledError
from qmpblock.testing.hang import look
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

PLAIN = parse_scenario("about: One disk.\nimages: [{size: 8M}]\n", "plain")


async def test_a_pending_pivot(start_qemu, invariant, vm_dir):
    vm = await start_qemu(PLAIN, guest=True)
    overlay = vm_dir / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), "8M"]
    await asyncio.to_thread(subprocess.run, command, check=True)
    storage = {"driver": "file", "filename": str(overlay)}
    await vm.execute("blockdev-add", driver="qcow2", node_name="over", backing=None, file=storage)
    await vm.execute("blockdev-snapshot", node="d0", overlay="over")
    await vm.execute("block-commit", job_id="c", device="over", base_node="d0", auto_finalize=False)
    for status, verb in (("ready", "job-complete"), ("pending", None)):
        async with asyncio.timeout(120):
            while (await vm.execute("query-jobs"))[0]["status"] != status:
                await asyncio.sleep(0.002)
        if verb:
            await vm.execute(verb, id="c")
    with pytest.raises(StalledError, match="silent") as caught:
        await vm.guest.write(0, 0, 4096, seq=1, seed=1, stall=0.5)
    assert "a job is pending, and holds the guest until it is finalized" in caught.value.standing
    assert "wakes it" not in caught.value.standing  # nothing is tried while it is held
    assert "The last lines of the guest's serial port" in caught.value.standing
    await vm.execute("job-finalize", id="c")
    await vm.guest.hello()  # it waits for the write to end
    await vm.execute("blockdev-del", node_name="over")


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
async def test_a_guest_that_is_well(start_qemu, invariant, machine):
    vm = await start_qemu(PLAIN, guest=True, machine=machine)
    await vm.guest.write(0, 0, 4096, seq=1, seed=1)
    seen = await look(vm.control, vm.pid)
    [queue] = seen.queues
    assert queue.offered == queue.taken == queue.done > 0
    assert "every request was answered" in seen.verdict()
