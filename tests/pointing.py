"""What the tests of points in time share: the disks, a guest that writes, and how it ends."""

import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from disturbed import nothing_of_ours, until
from fleecing import SPEC

from qmpblock.testing.stamps import StressSpec

SHOWN = 0xAA
CHAIN = """\
about: An overlay, over a base that holds what lies behind the area that the guest writes to.
images:
  - {format: raw, size: 18M, content: [write 16M 1M 0xaa]}
  - {size: 18M}
"""
ONE = """\
about: One disk.
images: [{format: FORMAT, size: 18M, content: [write 16M 1M 0xaa]}]
"""
IOTHREAD = "attach: {iothread: one}\n"
DISKS = {
    "raw": ONE.replace("FORMAT", "raw"),
    "chain": CHAIN,
    "throttle": CHAIN + "attach: {filters: [throttle]}\n",
    "copy-on-read": CHAIN + "attach: {filters: [copy-on-read]}\n",
    "throttle-over-copy-on-read": CHAIN + "attach: {filters: [throttle, copy-on-read]}\n",
    "virtio-scsi": CHAIN + "attach: {device: virtio-scsi}\n",
    "drive": CHAIN + "attach: {style: drive}\n",
    "drive-if": CHAIN + "attach: {style: drive-if}\n",
    "iothread": CHAIN + IOTHREAD,
    "throttle-iothread": CHAIN + "attach: {iothread: one, filters: [throttle]}\n",
    "luks": ONE.replace("FORMAT", "luks").replace("size:", "secret: sesame, size:"),
}
SAFE = pytest.mark.needs_qemu(">= 10.0", reason="K1")
TWO = """\
about: Two disks of different kinds.
disks:
  - {images: [{format: raw, size: 4M}]}
  - {images: [{size: 16M}], attach: {device: virtio-scsi}}
"""
STEPS = (
    StressSpec(disk=0, blocks=1024, block_size=4096, seed=1),
    StressSpec(disk=1, blocks=1024, block_size=16384, seed=2),
)


@pytest.fixture
def in_memory():
    """Return a directory for what is kept, in which no write waits for a busy disk.

    A point that has to wait for five seconds is given up, by design.
    """
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="kept-", dir=place) as directory:
        yield directory


@asynccontextmanager
async def taken(vm, disk, disks=(0,), **options):
    """Enter a point in time of a disk; yields it, and between which writes it lies."""
    async with AsyncExitStack() as stack:
        async with vm.guest.bounds(*disks) as bounds:
            point = await stack.enter_async_context(disk.point_in_time(**options))
        yield point, bounds[0]


async def at_ease(vm, *specs):
    for spec in specs or (SPEC,):
        done = await vm.guest.stop_stress(spec.disk)
        assert (done.bad, done.errors) == (0, 0), done
        assert await vm.guest.check(spec.disk) > 0
    await nothing_of_ours(vm)


async def written(vm, count, disk=0):
    """Wait until the guest has written so many blocks more."""
    before = (await vm.guest.progress(disk)).acked

    async def enough():
        return (await vm.guest.progress(disk)).acked >= before + count

    await until(enough, f"{count} writes")
