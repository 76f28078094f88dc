"""What the tests of resumed copies share: a disk, ways to die while it is copied, the verdict."""

import asyncio
import contextlib
import sys

from fleecing import ran

import qmpblock
from qmpblock.testing import Controller
from qmpblock.testing.stamps import StressSpec, check_point_in_time

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 64 << 10
SPEED = 12 * MIB  # bytes a second: seconds for the data of the disk
ENOUGH = 6 * MIB  # bytes, after which it dies
DISK = """\
about: An overlay that holds a part of the data, over a base that holds the rest.
images:
  - {format: raw, size: 64M, content: [write 0 28M 0xaa]}
  - {content: [write 20M 12M 0xbb, zero 4M 2M]}
"""
SPEC = StressSpec(
    offset=48 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=9, flush_every=20, rate=300
)
#: Of the guest that is started after QEMU has died.
LATER = StressSpec(
    offset=56 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=5, flush_every=20, rate=300
)

_CHILD = """
import asyncio, sys
import qmpblock
from qmpblock.copying.copy import copy
async def main(monitor, target, speed, enough, options):
    async with qmpblock.connect(monitor) as vm:
        [disk] = await vm.disks()
        async with copy(vm, {disk: target}, speed=int(speed), **eval(options)) as job:
            async for seen in job:
                if seen.phase == "copying" and seen.done > int(enough):
                    print("copying", flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


def child(vm, target, directory, **options):
    """Return a controller in a process of its own, which says "copying" when it has copied some."""
    words = (str(target), str(SPEED), str(ENOUGH), repr(options))
    return Controller([sys.executable, "-c", _CHILD, str(vm.monitor_path), *words], directory)


async def cancelled(vm, target, **options):
    """Cancel a copy when some of it is done; return what it says of what is kept."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        jobs = []

        async def copying():
            async with disk.copy(target, speed=SPEED, **options) as job:
                jobs.append(job)
                async for _ in job:
                    pass

        task = asyncio.ensure_future(copying())
        async with asyncio.timeout(200):  # keys are derived, with time taken for it
            while not (jobs and is_under_way(jobs[0])):
                assert not task.done(), task
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
    return jobs[0].kept


def is_under_way(job):
    """Whether a copy has copied some."""
    seen = job.progress
    return seen is not None and seen.phase == "copying" and seen.done >= ENOUGH


async def content(path, fmt):
    """Return what a guest would read from a closed image."""
    raw = path.with_name(f"{path.name}.content")
    code, out = await ran("qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw)
    assert code == 0, out
    data = raw.read_bytes()
    raw.unlink()
    return data


async def is_sound(path, fmt):
    """See that an image that was gone on from has no error, and no cluster that nothing uses."""
    if fmt == "qcow2":
        code, out = await ran("qemu-img", "check", "-f", fmt, path)
        assert code == 0, out


def unequal(first, second):
    """Return how many bytes are in blocks that differ."""
    return sum(
        len(first[at : at + BLOCK])
        for at in range(0, len(first), BLOCK)
        if first[at : at + BLOCK] != second[at : at + BLOCK]
    )


@contextlib.asynccontextmanager
async def resumed(vm, controller, target, **options):
    """Resume a copy of the one disk; yields the job, and between which writes its point lies."""
    [disk] = await controller.disks()
    async with contextlib.AsyncExitStack() as stack:
        async with vm.guest.bounds(0) as bounds:
            copying = disk.copy(target, resume=True, **options)
            job = await stack.enter_async_context(copying)
        yield job, bounds[0]


def check(data, bounds, spec=SPEC, rest=None):
    """See that a copy is the disk at one point within bounds.

    :param rest: what lies around the area; None: what the scenario says.
    """
    start, stop = spec.offset, spec.offset + spec.length
    found = check_point_in_time(data[start:stop], spec, bounds)
    assert found.ok, found
    wanted = rest or scenario_content()
    for part in (slice(0, start), slice(stop, None)):
        assert data[part] == wanted[part]


def scenario_content():
    """Return what the disk holds before a guest writes."""
    data = bytearray(SIZE)
    data[: 28 * MIB] = b"\xaa" * (28 * MIB)
    data[20 * MIB : 32 * MIB] = b"\xbb" * (12 * MIB)
    data[4 * MIB : 6 * MIB] = bytes(2 * MIB)
    return bytes(data)


def check_figures(job, before, after):
    """See that it copied what was missing or had changed, by the images, and nothing else."""
    [one] = job.result.disks
    assert one.compared == SIZE
    assert one.missing == unequal(before, after)
    assert one.copied == one.missing
