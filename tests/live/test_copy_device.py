"""Copies of running disks to block devices: those of loop(4), where this machine has them."""

import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest
from disturbed import nothing_of_ours
from loopdevices import loop

import qmpblock
from qmpblock.changes.leftovers import clear
from qmpblock.copying.copy import copy
from qmpblock.errors import InUseError, RequestError, UnsupportedError
from qmpblock.testing import Controller, Tools, build, parse_scenario
from qmpblock.testing.stamps import StressSpec, check_point_in_time

pytestmark = pytest.mark.live

MIB = 1 << 20
SIZE = 64 * MIB
SOURCE = "about: A disk.\nimages: [{size: 64M, content: [write 0 40M 0xaa]}]\n"
SPEC = StressSpec(
    offset=48 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=9, flush_every=20, rate=150
)
GARBAGE = b"\xee"

both = pytest.mark.parametrize("at", ["start", "end"])


@contextlib.contextmanager
def full_loop(image, size):
    """Have a file that is full of something else as a block device."""
    image.write_bytes(GARBAGE * size)
    with loop(image) as device:
        yield device


@pytest.fixture
async def vm(start_qemu, vm_dir, qemu_binary, invariant):
    text = parse_scenario(SOURCE, "source")
    built = await build(text, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    await invariant.begin(vm)
    return vm


async def unharmed(vm, invariant):
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    await nothing_of_ours(vm)
    await invariant.verify(vm)
    assert await vm.guest.check() > 0


@both
@pytest.mark.parametrize("more", [0, 8 * MIB])
async def test_to_a_device(vm, vm_dir, invariant, at, more):
    """Also to a larger one, whose rest is left as it is; it is nobody else's meanwhile."""
    image = vm_dir / "backing"
    with full_loop(image, SIZE + more) as device:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            copying = copy(controller, {disk: device}, at=at, force=True)
            async with contextlib.AsyncExitStack() as stack:
                async with vm.guest.bounds(0) as bounds:
                    job = await stack.enter_async_context(copying)
                with pytest.raises(OSError, match="busy"):
                    os.open(device, os.O_RDONLY | os.O_EXCL)
                if at == "end":
                    async for seen in job:
                        if seen.ready:
                            break
                    async with vm.guest.bounds(0) as bounds:
                        await job.complete()
            [done] = job.result.disks
            assert (done.target, done.size, done.format) == (device, SIZE, "raw")
        await unharmed(vm, invariant)
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    data = image.read_bytes()
    assert data[SIZE:] == GARBAGE * more
    assert data[: 40 * MIB] == b"\xaa" * (40 * MIB)
    assert data[40 * MIB : 48 * MIB] == bytes(8 * MIB)
    area = data[SPEC.offset : SPEC.offset + SPEC.blocks * SPEC.block_size]
    verdict = check_point_in_time(area, SPEC, bounds[0])
    assert verdict.ok, verdict
    assert data[SPEC.offset + len(area) : SIZE] == bytes(SIZE - SPEC.offset - len(area))


@both
@pytest.mark.parametrize("more", [{}, {"cluster_size": 4096}, {"compress": True}])
async def test_an_image_on_a_device(vm, vm_dir, invariant, at, more):
    """It is one as in a file, over whatever was there; of the tables nothing is lost."""
    if at == "end" and "compress" in more:
        pytest.skip("that is refused")
    image, size = vm_dir / "backing", SIZE + 4 * MIB
    with full_loop(image, size) as device:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            copying = disk.copy(device, at=at, force=True, format="qcow2", **more)
            async with contextlib.AsyncExitStack() as stack:
                async with vm.guest.bounds(0) as bounds:
                    job = await stack.enter_async_context(copying)
                if at == "end":
                    async for seen in job:
                        if seen.ready:
                            break
                    async with vm.guest.bounds(0) as bounds:
                        await job.complete()
            [done] = job.result.disks
            assert (done.target, done.size, done.format) == (device, SIZE, "qcow2")
        await unharmed(vm, invariant)
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", device], check=True)
        raw = vm_dir / "raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", device, raw], check=True)
    data = raw.read_bytes()
    assert data[: 40 * MIB] == b"\xaa" * (40 * MIB)
    assert data[40 * MIB : 48 * MIB] == bytes(8 * MIB)
    area = data[SPEC.offset : SPEC.offset + SPEC.blocks * SPEC.block_size]
    verdict = check_point_in_time(area, SPEC, bounds[0])
    assert verdict.ok, verdict
    assert data[SPEC.offset + len(area) :] == bytes(SIZE - SPEC.offset - len(area))


async def broken_off(copying, device):
    async with copying:
        seen = subprocess.run(["head", "-c4", device], capture_output=True, check=True)
        assert seen.stdout == b"QFI\xfb"
        raise ZeroDivisionError


@both
async def test_an_image_that_was_broken_off_is_none(vm, vm_dir, invariant, at):
    image, size = vm_dir / "backing", SIZE + 4 * MIB
    with full_loop(image, size) as device:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            copying = disk.copy(device, at=at, force=True, format="qcow2", speed=MIB)
            with pytest.raises(ZeroDivisionError):
                await broken_off(copying, device)
        await unharmed(vm, invariant)
    assert image.read_bytes()[:512] == bytes(512)


async def test_what_cannot_be_is_refused(vm, vm_dir, invariant):
    small, image = vm_dir / "small", vm_dir / "backing"
    with full_loop(small, SIZE - MIB) as too_small, full_loop(image, SIZE) as device:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            for target, more, error, words in (
                (too_small, {"force": True}, RequestError, f"{SIZE - MIB} bytes.*{SIZE}"),
                (device, {}, RequestError, "would be overwritten"),
                (device, {"format": "qcow2", "force": True}, RequestError, "in a qcow2 image"),
                (
                    device,
                    {"format": "qcow2", "force": True, "resume": True, "at": "start"},
                    UnsupportedError,
                    "is not gone on from",
                ),
                (
                    device,
                    {"format": "qcow2", "force": True, "allocation": "full"},
                    UnsupportedError,
                    "nothing to be reserved",
                ),
                (device, {"at": "pivot", "force": True}, UnsupportedError, "cannot go over"),
            ):
                await refused(controller, disk, target, error, words, **more)
            more = {"at": "start", "verify": True, "force": True}
            if not controller.capabilities.jobs_misread_views:
                words = "is not proven"
                await refused(controller, disk, device, UnsupportedError, words, **more)
            fd = os.open(device, os.O_RDONLY)
            await refused(controller, disk, device, InUseError, f"process {os.getpid()}")
            os.close(fd)
            subprocess.run(["mkfs.ext4", "-q", "-F", too_small], check=True)
            place = vm_dir / "mounted"
            place.mkdir()
            subprocess.run(["mount", too_small, str(place)], check=True)
            try:
                await refused(controller, disk, too_small, InUseError, "in use on this host")
            finally:
                subprocess.run(["umount", str(place)], check=True)
            node = {"driver": "host_device", "node-name": "n", "filename": device}
            await vm.execute("blockdev-add", **node)
            await refused(controller, disk, device, InUseError, "in the VM itself", force=True)
            await vm.execute("blockdev-del", **{"node-name": "n"})
        await unharmed(vm, invariant)
    assert image.read_bytes() == GARBAGE * SIZE


async def refused(controller, disk, target, error, words, **more):
    with pytest.raises(error, match=words) as caught:
        async with copy(controller, {disk: target}, **{"at": "end"} | more):
            pytest.fail("it copies")
    assert "nothing was touched" in str(caught.value.standing)


async def test_another_vm_that_uses_it(vm, vm_dir, invariant, qemu_binary):
    """QEMU puts no locks on a block device, by which either could tell."""
    with full_loop(vm_dir / "backing", SIZE) as device:
        pidfile = vm_dir / "other.pid"
        command = [qemu_binary, "-nodefaults", "-display", "none", "-S", "-daemonize"]
        command += ["-pidfile", str(pidfile), "-blockdev"]
        command += [f"driver=host_device,node-name=n,filename={device}"]
        subprocess.run([*command, "-device", "virtio-blk-pci,drive=n"], check=True)
        try:
            async with qmpblock.connect(vm.monitor_path) as controller:
                [disk] = await controller.disks()
                with pytest.raises(InUseError, match=f"process {pidfile.read_text().strip()}"):
                    async with copy(controller, {disk: device}, at="end", force=True):
                        pytest.fail("it copies")
        finally:
            other = os.pidfd_open(int(pidfile.read_text()))
            signal.pidfd_send_signal(other, signal.SIGKILL)
            select.select([other], [], [])
            os.close(other)
        await unharmed(vm, invariant)
    assert (vm_dir / "backing").read_bytes() == GARBAGE * SIZE


CHILD = """
import asyncio, sys
import qmpblock
from qmpblock.copying.copy import copy
async def main(monitor, target, at):
    async with qmpblock.connect(monitor) as vm:
        [disk] = await vm.disks()
        async with copy(vm, {disk: target}, at=at, speed=8 << 20, force=True) as job:
            async for seen in job:
                if seen.done > 4 << 20:
                    print("copying", flush=True)
                    await asyncio.sleep(60)
asyncio.run(main(*sys.argv[1:]))
"""


@both
async def test_a_controller_that_is_killed(vm, vm_dir, invariant, at):
    with full_loop(vm_dir / "backing", SIZE) as device:
        command = [sys.executable, "-c", CHILD, vm.monitor_path, device, at]
        async with Controller(command, vm_dir) as child:
            await child.wait_for_output("copying")
            child.kill()
        async with qmpblock.connect(vm.monitor_path) as controller:
            await clear(controller)
        await unharmed(vm, invariant)
