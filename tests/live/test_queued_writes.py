"""K26: writes that wait in QEMU, not in the guest's own queue, while a disk pivots."""

import asyncio

import pytest
from killing import MOMENTS, OPERATIONS, Matrix

import qmpblock
from qmpblock.errors import DisconnectedError
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

SCENARIO = """
about: An overlay over an image whose node holds no right to write of its own.
attach: {device: DEVICE}
images:
  - {format: FORMAT, size: 8M}
  - {OVERLAY}
"""
OFF = {
    "virtio-blk": ("-global", "virtio-blk-pci.ioeventfd=off"),
    "virtio-scsi": ("-global", "virtio-scsi-pci.ioeventfd=off"),
}


def scenario(device, fmt):
    """Return a chain of two, encrypted where the lower one is."""
    text = SCENARIO.replace("DEVICE", device)
    if fmt == "luks":
        text = text.replace("FORMAT", "luks, secret: sesame")
        text = text.replace("OVERLAY", "options: {encrypt.format: luks}, secret: sesame")
    return parse_scenario(text.replace("FORMAT", fmt).replace("OVERLAY", ""), f"{device}-{fmt}")


async def started(start_qemu, device, fmt, extra=()):
    vm = await start_qemu(scenario(device, fmt), guest=True, extra=extra)
    spec = StressSpec(offset=4 << 20, blocks=512, block_size=4096, queue_depth=16, flush_every=64)
    await vm.guest.stress(spec)
    return vm


@pytest.mark.parametrize("fmt", ["raw", "luks", "qcow2"])
@pytest.mark.parametrize("device", OFF)
@pytest.mark.parametrize("ioeventfd", [True, False], ids=["ioeventfd", "queued"])
async def test_a_commit_while_writes_wait_in_qemu(
    device, fmt, ioeventfd, start_qemu, invariant, qemu_version
):
    """The guest goes on; it was paused for a moment only where QEMU would have aborted."""
    vm = await started(start_qemu, device, fmt, () if ioeventfd else OFF[device])
    invariant.forget(vm)  # the chain is another one
    stops = vm.control.subscribe("STOP")
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.commit():
            pass
        assert disk.chain.active.format == fmt
    pauses = fmt in ("raw", "luks") and not ioeventfd and qemu_version < (10, 0, 0)
    assert len(list(stops.pending())) == pauses
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    assert not [one for one in nodes if one["node-name"].startswith("qmpblock")]
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0


async def test_one_that_was_paused_stays_so(start_qemu, invariant):
    vm = await started(start_qemu, "virtio-blk", "raw", OFF["virtio-blk"])
    invariant.forget(vm)
    await vm.execute("stop")
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.commit():
            pass
    assert (await vm.execute("query-status"))["status"] == "paused"
    await vm.execute("cont")


async def test_what_qemu_does_by_itself(start_qemu, invariant, qemu_version):
    """Without a pause QEMU 7.2 aborts."""
    vm = await started(start_qemu, "virtio-blk", "raw", OFF["virtio-blk"])
    invariant.forget(vm)
    options = {"auto-finalize": False, "auto-dismiss": False}
    await vm.execute("block-commit", **{"job-id": "j", "device": "d0", **options})
    await wait_for(vm, "ready")
    await vm.execute("job-complete", id="j")
    await wait_for(vm, "pending")
    await asyncio.sleep(0.1)  # in which the guest hands over what it has to write
    if qemu_version < (10, 0, 0):
        with pytest.raises(DisconnectedError):
            await vm.execute("job-finalize", id="j")
        assert "BLK_PERM_WRITE" in vm.evidence()
        vm.expect_exit()
    else:
        await vm.execute("job-finalize", id="j")
        await wait_for(vm, "concluded")
        await vm.execute("job-dismiss", id="j")


async def wait_for(vm, status):
    async with asyncio.timeout(60):
        while [one["status"] for one in await vm.execute("query-jobs")] != [status]:
            await asyncio.sleep(0.01)


async def test_a_controller_killed_around_the_pause(vm_dir, qemu_binary, qemu_version):
    """Whoever carries on finds the mark of a pause, and a VM that is paused, or not yet."""
    [operation] = [one for one in OPERATIONS if str(one) == "pivot-queued"]
    async with Matrix(operation, vm_dir, qemu_binary) as matrix:
        trace = matrix.reference.trace
        around = [n for n, command in enumerate(trace, 1) if command in ("stop", "cont")]
        assert bool(around) is (qemu_version < (10, 0, 0))
        for number in around:
            for moment in MOMENTS:
                assert await matrix.killed_controller(number, moment, "carry-on")
