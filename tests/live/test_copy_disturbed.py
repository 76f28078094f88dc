"""Copies that somebody disturbs in the middle: the guest's disk, its machine, or its chain.

Whatever is done, the copy is right or there is none, and the guest goes on; docs/copy.md has the
table.
"""

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import pytest
from disturbed import nothing_of_ours, seen, until, writes_on

import qmpblock
from qmpblock.errors import BusyError, CommandError, Error, JobError
from qmpblock.testing import (
    Tools,
    build,
    fill_up,
    inject,
    parse_scenario,
    small_file_system,
    unplug,
)
from qmpblock.testing.stamps import Bounds, StressSpec, check_point_in_time

pytestmark = pytest.mark.live

MIB = 1 << 20
SIZE = 64 * MIB
SOURCE = (
    "about: A disk.\nimages: [{size: 64M, content: [write 0 40M 0xaa]}, "
    "{content: [write 3M 1M 0xbb]}, {content: [write 5M 1M 0xcc]}]\n"
)
SPEC = StressSpec(
    offset=48 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=9, flush_every=20, rate=150
)
SLOW = 8 * MIB  # bytes a second

ways = pytest.mark.parametrize("way", ["start", "end", "pivot"])


class Disturbed:
    """One copy, and what is done to it in the middle.

    :ivar error: with which it failed; None where it is whole.
    """

    def __init__(self, vm, vm_dir, way, fmt="raw"):
        self.vm, self.directory, self.way, self.format = vm, vm_dir, way, fmt
        self.target = vm_dir / f"copy.{fmt}"
        self.disk = self.job = None
        self.stopped = None  # the bounds of a guest that does not write any more
        self.error = None
        self.point = None

    @asynccontextmanager
    async def copying(self, stall=20, **words):
        """Copy, slowly until the body has ended, which disturbs it in the middle."""
        words |= {"pivot": True} if self.way == "pivot" else {"at": self.way}
        async with qmpblock.connect(self.vm.monitor_path, stall=stall) as controller:
            [self.disk] = await controller.disks()
            copying = self.disk.copy(self.target, format=self.format, speed=SLOW, **words)
            try:
                async with AsyncExitStack() as stack:
                    async with self.vm.guest.bounds(0) as bounds:
                        job = await stack.enter_async_context(copying)
                    self.point, self.job = bounds[0], job
                    async for one in job:
                        if one.done > 4 * MIB:
                            break
                    await self.disk.refresh()
                    yield self
                    with suppress(CommandError):  # it has failed by now: that is to be said
                        await job.set_speed(0)
                    await self._complete(job)
            except Error as error:
                if self.job is None:
                    raise
                self.error = error

    async def _complete(self, job):
        async for one in job:
            if one.ready:
                break
        if self.way != "end" or self.stopped is not None:
            await job.complete()
        else:
            async with self.vm.guest.bounds(0) as bounds:
                await job.complete()
            self.point = bounds[0]

    async def stop(self):
        """Have the guest write no more, for what comes it does not survive, or its disk."""
        done = await self.vm.guest.stop_stress()
        assert (done.bad, done.errors) == (0, 0), done
        self.stopped = Bounds(done.acked, done.issued)
        if self.way == "pivot" or (self.way == "end" and self.job.result is None):
            self.point = self.stopped

    async def ended(self):
        """See that the guest went on without an error, and how long it waited."""
        assert (await self.vm.execute("query-status"))["status"] == "running"
        if self.stopped is None:
            held = (await self.vm.guest.latency()).held_us / 1e6
            print(f"{self.way}: longest hold of a request of the guest's: {held:.3f} s")
            assert held < 20
            await self.stop()
            assert await self.vm.guest.check() > 0

    def check(self):
        """Check that the copy is the disk at its point, or that there is none."""
        if self.error is not None:
            left = [str(path) for path in self.directory.glob("copy.*")]
            assert left in ([], [f"{self.target}.partial"])  # which --resume takes
            assert not left or left[0] in str(self.error)
            assert left == list(self.job.kept)
            return
        check_whole(self.target.read_bytes(), self.point)

    async def size(self):
        """Return how large the guest's disk is."""
        [one] = [one for one in await self.vm.execute("query-block") if one.get("qdev")]
        return one["inserted"]["image"]["virtual-size"]


def check_whole(data, bounds):
    """Check that what was copied is the disk at one point between those bounds."""
    assert len(data) == SIZE
    assert data[: 3 * MIB] == b"\xaa" * (3 * MIB)
    assert data[3 * MIB : 4 * MIB] == b"\xbb" * MIB
    assert data[5 * MIB : 6 * MIB] == b"\xcc" * MIB
    assert data[6 * MIB : 40 * MIB] == b"\xaa" * (34 * MIB)
    assert data[40 * MIB : 48 * MIB] == bytes(8 * MIB)
    area = data[SPEC.offset : SPEC.offset + SPEC.blocks * SPEC.block_size]
    verdict = check_point_in_time(area, SPEC, bounds)
    assert verdict.ok, verdict
    assert data[SPEC.offset + len(area) :] == bytes(SIZE - SPEC.offset - len(area))


async def started(start_qemu, vm_dir, qemu_binary, change=lambda disk: disk):
    built = await build(parse_scenario(SOURCE, "source"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(replace(built, disks=(change(built.disks[0]),)), guest=True)
    await vm.guest.stress(SPEC)

    async def writes():
        return (await vm.guest.progress()).acked > 0

    await until(writes, "a write")
    return vm


REFUSED, DONE = "refused", "done"

#: Commands of somebody else's, by which node they name: the active layer, or what the guest has
#: above that; and what becomes of it beside a copy of the start: on QEMU before 10.0, and later.
#: Beside mirrors, of the end and a pivot, all of them are refused.
COMMANDS = {
    ("block_resize", "active"): (REFUSED, REFUSED),
    ("block_resize", "root"): (DONE, DONE),
    ("blockdev-snapshot", "active"): (DONE, DONE),
    ("blockdev-snapshot", "root"): (
        "somebody took a snapshot of vd0 while an overlay of ours",
        "Operation not supported",
    ),
    ("block-commit", "active"): (REFUSED, REFUSED),
    ("block-commit", "root"): (DONE, REFUSED),
    ("block-stream", "active"): (DONE, DONE),
    ("block-stream", "root"): (REFUSED, None),  # K29
    ("blockdev-backup", "active"): (DONE, DONE),
    ("blockdev-mirror", "active"): (REFUSED, REFUSED),
}


async def add_theirs(vm, vm_dir, qemu_binary):
    """Add a node of somebody else's, for what needs one."""
    path, tools = str(vm_dir / "theirs.qcow2"), Tools.of(qemu_binary)
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", path, str(SIZE))
    file = {"driver": "file", "filename": path}
    await vm.execute("blockdev-add", driver="qcow2", node_name="theirs", backing=None, file=file)


def arguments_of(command, node, below):
    """Return those of a command of somebody else's."""
    job = {"job_id": "theirs", "device": node}
    return {
        "block_resize": {"node_name": node, "size": 2 * SIZE},
        "blockdev-snapshot": {"node": node, "overlay": "theirs"},
        "block-commit": job | {"top_node": below[0], "base_node": below[1]},
        "block-stream": job,
        "blockdev-backup": job | {"target": "theirs", "sync": "full", "speed": 12 * MIB},
        "blockdev-mirror": job | {"target": "theirs", "sync": "full"},
    }[command]


@ways
@pytest.mark.parametrize(("command", "node"), list(COMMANDS))
async def test_somebody_commands_the_chain(
    way, command, node, start_qemu, vm_dir, qemu_binary, qemu_version, invariant
):
    wanted = COMMANDS[command, node][qemu_version >= (10, 0, 0)] if way == "start" else REFUSED
    if wanted is None:
        pytest.skip("QEMU keeps our filter for good then (K29): see the test of that")
    vm = await started(start_qemu, vm_dir, qemu_binary)
    if wanted != REFUSED:
        invariant.forget(vm)  # its chain is what they made of it
    its = Disturbed(vm, vm_dir, way)
    needs = command in ("blockdev-snapshot", "blockdev-backup", "blockdev-mirror")
    async with its.copying():
        if needs:
            await add_theirs(vm, vm_dir, qemu_binary)
        name = "d0" if node == "active" else its.disk.chain.root.name
        said = arguments_of(command, name, ("d0-1", "d0-2"))
        if wanted == REFUSED:
            with pytest.raises(CommandError) as caught:
                await vm.execute(command, **said)
            print(f"{command} of {name} beside a copy of {way}: {caught.value}")
        else:
            await vm.execute(command, **said)
    print(f"{command} of the {node} node beside a copy of {way}: {its.error or 'whole'}")
    await its.ended()
    if wanted in (REFUSED, DONE):
        assert its.error is None
        grown = (command, wanted) == ("block_resize", DONE)
        assert await its.size() == (2 * SIZE if grown else SIZE)
    else:
        assert wanted in str(its.error)
    its.check()
    await over(vm)
    if wanted == REFUSED and needs:
        await vm.execute("blockdev-del", node_name="theirs")
    if (command, node) != ("blockdev-snapshot", "root") or qemu_version >= (10, 0, 0):
        await nothing_of_ours(vm)
    if way == "pivot":
        invariant.forget(vm)  # test_copy.py has what it is then


async def paused_by_them(vm, *, paused=True):
    """Have somebody's job be on the disk, which is paused, or does not end in a test's time."""
    backup = {"device": "d0", "target": "theirs", "sync": "full", "speed": 1}
    await vm.execute("blockdev-backup", job_id="theirs", **backup)
    if paused:
        await vm.execute("job-pause", id="theirs")

        async def stands():
            return [one["status"] for one in await vm.execute("query-jobs")] == ["paused"]

        await until(stands, "a job that is paused")


@ways
async def test_a_job_that_somebody_has_paused_is_not_waited_for(
    way, start_qemu, vm_dir, qemu_binary, invariant
):
    """It would be for ever."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    await add_theirs(vm, vm_dir, qemu_binary)
    await paused_by_them(vm)
    await invariant.begin(vm)
    with pytest.raises(BusyError, match=r"the job theirs \(backup, paused\) runs on vd0") as caught:
        async with Disturbed(vm, vm_dir, way).copying():
            pass
    assert caught.value.standing == "nothing was touched"
    assert "does not end by itself" in caught.value.remedy
    assert not list(vm_dir.glob("copy*"))
    await invariant.verify(vm)
    await vm.execute("job-cancel", id="theirs")
    await over(vm)
    await vm.execute("blockdev-del", node_name="theirs")
    invariant.forget(vm)
    its = Disturbed(vm, vm_dir, way)
    async with its.copying():
        pass
    await its.ended()
    assert its.error is None
    its.check()


@pytest.mark.needs_qemu(">= 10.0", reason="before, it keeps an overlay from coming home")
async def test_a_job_that_somebody_has_paused_keeps_nothing_there(
    start_qemu, vm_dir, qemu_binary, invariant
):
    """Neither a view, nor the filter in the guest's way: the copy is whole."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    its = Disturbed(vm, vm_dir, "start")
    async with its.copying():
        await add_theirs(vm, vm_dir, qemu_binary)
        await paused_by_them(vm)
    assert its.error is None
    its.check()
    await vm.execute("job-cancel", id="theirs")
    await over(vm)
    await its.ended()
    await vm.execute("blockdev-del", node_name="theirs")
    await nothing_of_ours(vm)


@pytest.mark.needs_qemu("< 10.0", reason="from there on no overlay has to come home")
@pytest.mark.parametrize("paused", [False, True])
async def test_somebodys_job_keeps_an_overlay_from_coming_home(
    paused, start_qemu, vm_dir, qemu_binary, invariant
):
    """The guest goes on in it, until that job has ended."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    its = Disturbed(vm, vm_dir, "start")
    async with its.copying(stall=3):
        await add_theirs(vm, vm_dir, qemu_binary)
        await paused_by_them(vm, paused=paused)
        began = time.monotonic()
    print(f"it was waited for {time.monotonic() - began:.1f} s")
    assert isinstance(its.error, BusyError)
    assert "somebody else's job is at work" in str(its.error)
    assert "qmpblock recover" in its.error.remedy
    its.check()
    await vm.execute("job-cancel", id="theirs")
    await over(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        print(*[step for one in await controller.recover() for step in one.steps], sep="\n")
    await its.ended()
    await vm.execute("blockdev-del", node_name="theirs")
    await nothing_of_ours(vm)


async def over(vm):
    """Wait until no job is there any more, ours or not."""

    async def none():
        return not await vm.execute("query-jobs")

    await until(none, "the end of somebody's job")


async def system_reset(its):
    await its.stop()
    await its.vm.execute("system_reset")
    await asyncio.sleep(0.5)


async def guests_own_reset(its):
    await its.stop()
    await its.vm.guest.reset()


async def pause(its):
    await its.vm.execute("stop")
    await asyncio.sleep(0.3)
    await its.vm.execute("cont")


async def unplugging(its):
    await its.stop()
    await unplug(its.vm, "d0")


@ways
@pytest.mark.parametrize("disturb", [system_reset, guests_own_reset, pause, unplugging])
async def test_something_happens_to_the_machine(
    way, disturb, start_qemu, vm_dir, qemu_binary, invariant
):
    """The copy is whole, of a disk that was unplugged, too."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    if disturb is unplugging or way == "pivot":
        invariant.forget(vm)
    its = Disturbed(vm, vm_dir, way)
    async with its.copying():
        await disturb(its)
    assert its.error is None
    await its.ended()
    its.check()
    await nothing_of_ours(vm)


@ways
async def test_the_source_cannot_be_read(way, start_qemu, vm_dir, qemu_binary, invariant):
    """The copy fails in QEMU's words; the guest, which writes elsewhere, does not notice."""
    vm = await started(
        start_qemu,
        vm_dir,
        qemu_binary,
        lambda disk: inject(disk, "read_aio", "EIO", layer=2, offset=24 * MIB),
    )
    its = Disturbed(vm, vm_dir, way)
    with vm.control.subscribe("BLOCK_JOB_ERROR") as failures:
        async with its.copying():
            pass
        actions = {event["data"]["action"] for event in failures.pending()}
    assert isinstance(its.error, JobError)
    # On 7.2 a mirror does not end by itself: that may not be while QEMU flushes (K34).
    stops = vm.version < (8,) and way != "start"
    assert ("I/O error (a read failed" if stops else "Input/output error") in str(its.error)
    assert actions == {"stop" if stops else "report"}
    assert "copy.raw" in its.error.standing
    await its.ended()
    its.check()
    await nothing_of_ours(vm)


@ways
async def test_the_target_has_no_room(way, start_qemu, vm_dir, qemu_binary, invariant):
    """The copy waits for some, and the guest does not."""
    async with small_file_system(vm_dir / "small", 24 * MIB) as small:
        vm = await started(start_qemu, vm_dir, qemu_binary)
        if way == "pivot":
            invariant.forget(vm)
        its = Disturbed(vm, small, way, "qcow2")
        async with its.copying():
            await its.job.set_speed(0)
            waiting = await seen(its.job, lambda one: one.phase == "waiting for room", "full")
            print(waiting)
            await writes_on(vm.guest, count=100)
            await remount(small, 96 * MIB)
        assert its.error is None
        await its.ended()
        raw, tools = vm_dir / "copy.raw", Tools.of(qemu_binary)
        if way == "pivot":
            await vm.quit()
        convert = ("convert", "-f", "qcow2", "-O", "raw", str(its.target), str(raw))
        await tools.run(tools.img, *convert)
        check_whole(raw.read_bytes(), its.point)
        if way != "pivot":
            await nothing_of_ours(vm)


_OLD = pytest.mark.needs_qemu(">= 10.0", reason="before, what the guest writes needs room there")


@pytest.mark.parametrize("way", [pytest.param("start", marks=_OLD), "end", "pivot"])
async def test_the_room_of_the_guests_own_images_is_not_waited_for(
    way, start_qemu, vm_dir, qemu_binary, invariant
):
    """Whoever waits there has the guest wait, too: the copy is given up, and its room is free."""
    async with small_file_system(vm_dir / "small", 96 * MIB) as small:
        text = parse_scenario(SOURCE, "source")
        vm = await start_qemu(await build(text, small / "images", Tools.of(qemu_binary)))
        fill_up(small, leave=4 * MIB)
        words = {"pivot": True} if way == "pivot" else {"at": way}
        kept = {"fleece": vm_dir} if way == "start" else {}
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            with pytest.raises(Error, match="grows there, too: the copy does not wait") as caught:
                async with disk.copy(small / "copy", format="qcow2", **words, **kept):
                    pass
        assert "make room there" in caught.value.remedy
        assert "cont" not in caught.value.remedy  # its guest does not write
        assert not list(small.glob("copy*"))
        await nothing_of_ours(vm)
        await invariant.verify(vm)
        invariant.forget(vm)
        await vm.quit()


async def remount(small, size):
    command = ("mount", "-o", f"remount,size={size}", str(small))
    assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0


@pytest.mark.parametrize("full", ["file system", "limit"])
@pytest.mark.needs_qemu(">= 10.0", reason="before, what the guest writes is kept, not what was")
async def test_what_is_kept_has_no_room(full, start_qemu, vm_dir, qemu_binary, invariant):
    async with small_file_system(vm_dir / "small", 24 * MIB) as small:
        vm = await started(start_qemu, vm_dir, qemu_binary)
        its = Disturbed(vm, vm_dir, "start")
        limit = 6 * MIB if full == "limit" else None
        async with its.copying(fleece=small, fleece_limit=limit):
            if full == "file system":
                fill_up(small, leave=MIB)  # the guest writes meanwhile, too
            await vm.guest.fill(0, 32 * MIB, 8 * MIB, 0xDD)
        print(its.error)
        assert isinstance(its.error, JobError)
        assert f"no room any more in {small}/" in its.error.remedy
        assert "--fleece" in its.error.remedy
        await its.ended()
        its.check()
        await nothing_of_ours(vm)
        assert [path.name for path in small.iterdir() if "qmpblock" in path.name] == []


@pytest.mark.needs_qemu(">= 10.0", reason="before, a copy of the start has no filter")
async def test_a_stream_that_qemu_refuses_keeps_a_filter(
    start_qemu, vm_dir, qemu_binary, invariant
):
    """For good: it loses a reader of the node that it was to stream into (K29)."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    its = Disturbed(vm, vm_dir, "start")
    async with its.copying():
        root = its.disk.chain.root.name
        with pytest.raises(CommandError, match="Permission conflict"):
            await vm.execute("block-stream", job_id="theirs", device=root)
    assert "Permission conflict" in str(its.error)
    await its.ended()
    graph = await vm.execute("x-debug-query-block-graph")
    names = {one["id"]: one["name"] for one in graph["nodes"]}
    left = [names[one["parent"]] for one in graph["edges"] if names[one["child"]] == root]
    assert sorted(left) == ["", "/machine/peripheral/vd0/virtio-backend"]


@ways
@pytest.mark.parametrize("how", ["moved", "removed"])
async def test_the_directory_of_the_target_goes(way, how, start_qemu, vm_dir, qemu_binary):
    """It is not said to be where it is not, and no guest goes over to what has no name."""
    vm = await started(start_qemu, vm_dir, qemu_binary)
    place = vm_dir / "place"
    place.mkdir()
    disturbed = Disturbed(vm, vm_dir, way)
    disturbed.target = place / "copy.raw"
    async with disturbed.copying():
        if how == "moved":
            place.rename(vm_dir / "elsewhere")
        else:
            for one in place.iterdir():
                one.unlink()
            place.rmdir()
    assert "is the copy no more" in str(disturbed.error)
    assert "there is no copy" in disturbed.error.standing
    assert disturbed.job.kept == ()
    assert (disturbed.disk.device.chain.active.file or "").startswith(str(vm_dir / "images"))
    left = list((vm_dir / "elsewhere").iterdir()) if how == "moved" else []
    assert way == "pivot" or [one.name for one in left] in ([], ["copy.raw.partial"])
    await disturbed.ended()
    await nothing_of_ours(vm)
