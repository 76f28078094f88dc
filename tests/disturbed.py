"""What the live tests of disturbed jobs share: the operations, a writing guest, the verdict.

The scenario is chain-3.yaml. Its guest writes to 4 MiB that the active layer holds already,
so that it goes on also where a file system is full; the jobs copy what lies around it.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from qmpblock.testing.images import Tools, build
from qmpblock.testing.stamps import StressSpec, check_acknowledged

SPEC = StressSpec(
    offset=4 << 20, blocks=1024, block_size=4096, queue_depth=4, seed=77, flush_every=20, rate=150
)
BACKGROUND = 0xC4  # what chain-3.yaml has there
SLOW = 512 << 10  # bytes a second: a job takes six seconds and more
OPERATIONS = ("stream", "commit", "pivot")


def begin(disk, operation, *, speed=0, **more):
    """Start one: into the active layer, of the middle layer, or of the active layer."""
    if operation == "stream":
        return disk.stream(speed=speed, **more)
    if operation == "commit":
        return disk.commit(top="@1", speed=speed, **more)
    return disk.commit(speed=speed, **more)


def written_layer(operation):
    """Return the depth of the layer that the operation writes to."""
    return 0 if operation == "stream" else 2


async def build_chain(scenario, vm_dir, qemu_binary):
    return await build(scenario, vm_dir / "images", Tools.of(qemu_binary))


async def until(found, what, limit=60.0):
    """Wait until `found()`, which may be a coroutine function, is true; return what it was."""
    deadline = asyncio.get_running_loop().time() + limit
    while True:
        value = found()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert asyncio.get_running_loop().time() < deadline, f"never seen: {what}"
        await asyncio.sleep(0.02)


async def writes_on(guest, disk=0, count=1):
    """Wait until a guest has written so many times more: by now it need not have."""
    before = (await guest.progress(disk)).acked

    async def more():
        return (await guest.progress(disk)).acked >= before + count

    await until(more, "a guest that writes on")


async def seen(job, condition, what, limit=60.0):
    """Wait until a job's progress meets `condition`; return that progress."""

    def look():
        if job.progress and condition(job.progress):
            return job.progress
        assert not job.over, f"over, and never seen: {what}; at last: {job.progress}"
        return None

    return await until(look, what, limit)


async def copying(job):
    """Wait until a job is in the middle (a pivoting one counts what it has asked to be read)."""
    return await seen(job, lambda p: p.status == "running" and p.done > 0, "copying")


async def ended(job):
    """Wait until the job is over, in whatever way."""
    async for _ in job:
        pass


async def ready(job):
    return await seen(job, lambda p: p.ready, "ready")


@contextlib.asynccontextmanager
async def struck(disk, operation, *, at_ready=False):
    """Start an operation, and enter when it is in the middle, or ready to pivot."""
    async with begin(disk, operation, speed=0 if at_ready else SLOW) as job:
        await (ready(job) if at_ready else copying(job))
        yield job


#: Where faults strike: the operation, and whether when it is ready to pivot.
MOMENTS = (("stream", False), ("commit", False), ("pivot", False), ("pivot", True))


async def nothing_of_ours(vm):
    """Assert that a VM, and this host, have nothing left of any controller of ours."""
    objects = {item["name"] for item in await vm.execute("qom-list", path="/objects")}
    left = {name for name in objects if "qmpblock" in name}
    assert not left, left
    jobs = [job["id"] for job in await vm.execute("query-jobs")]
    assert not [job for job in jobs if job.startswith("qmpblock")]
    assert not [e for e in await vm.execute("query-block-exports") if "qmpblock" in e["id"]]
    no_journals(vm)


def no_journals(vm):
    state = Path(os.environ["QMPBLOCK_STATE"])
    assert list(state.glob("*.journal")) == []
    for directory in vm.image_directories():
        assert list(directory.glob("*.qmpblock-*")) == []


async def locks(vm):
    names = {item["name"] for item in await vm.execute("qom-list", path="/objects")}
    return {name for name in names if name.startswith("qmpblock-")}


@dataclass(frozen=True)
class Content:
    """What the whole disk must hold, once its guest has ended."""

    expected: bytes

    @classmethod
    async def of(cls, built, tools):
        return cls(await read(built.disks[0].active, tools))


async def read(image, tools, path=None):
    """Return the content of a closed image, with all that lies below it."""
    raw = image.path.parent / "content.raw"
    name = str(path or image.path)
    await tools.run(tools.img, "convert", "-f", image.spec.format, "-O", "raw", name, str(raw))
    data = raw.read_bytes()
    raw.unlink()
    return data


async def undisturbed_guest(vm):
    """End the stress run: nothing failed, and every block is as it was written."""
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert done.acked > 0
    assert await vm.guest.check() > 0
    return done


async def verify(vm, tools, content, done, *, path=None, crashed=False, layer=0):
    """Read the disk on the host: every acknowledged write is there, all else as it was.

    :param path: the image to start from now.
    :param done: the guest's last report; after a crash more may have been written since.
    :param layer: the depth at which that image was.
    """
    if vm.running:
        await vm.quit()
    image = vm.disks[0].active.chain()[layer]
    data = await read(image, tools, path)
    area = slice(SPEC.offset, SPEC.offset + SPEC.length)
    bounds = (done.flushed, done.issued + 100_000) if crashed else (done.acked, done.issued)
    verdict = check_acknowledged(data[area], SPEC, *bounds, background=BACKGROUND)
    assert verdict.ok, verdict
    assert data[: area.start] == content.expected[: area.start]
    assert data[area.stop :] == content.expected[area.stop :]
    await image.check(tools)
