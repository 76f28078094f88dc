"""Room ahead of guests that write: made, used by QEMU, made again, and taken away by nobody."""

import asyncio
import contextlib
import itertools
import os
from pathlib import Path

import pytest
from allocating import content
from rounds import with_guest
from watching import (
    MIB,
    alone,
    armed,
    armed_node,
    built,
    eventually,
    filled,
    locks,
    past_the_end,
    small_ext4,
    watching,
)

import qmpblock
from qmpblock.allocation import watch as ahead
from qmpblock.allocation.rawfile import reserve_ranges
from qmpblock.allocation.room import find_place, look
from qmpblock.errors import BusyError, Error, NotFoundError, UnsupportedError
from qmpblock.host.space import blank_ranges
from qmpblock.ranges import Ranges
from qmpblock.speed import Speed
from qmpblock.testing.faults import fill_up, small_file_system, unplug
from qmpblock.testing.guest import GuestError
from qmpblock.testing.images import Tools
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_acknowledged, checksum, stamped

pytestmark = pytest.mark.live

ROOM = 32 * MIB  # more than the largest block of any format
FORMATS = (
    "device-ide.yaml",
    "device-nvme.yaml",
    "drive-virtio.yaml",
    "filter-throttle.yaml",
    "iothread-virtio-blk.yaml",
    "iothread-virtio-scsi.yaml",
    "luks.yaml",
    "no-id-virtio-blk.yaml",
    "qcow1-chain.yaml",
    "qcow2-data-file-raw.yaml",
    "qcow2-data-file.yaml",
    "qcow2-luks.yaml",
    "qed-chain.yaml",
    "raw-sparse.yaml",
    "vdi.yaml",
    "vmdk-single.yaml",
    "vpc.yaml",
)


async def verified(vm, spec):
    """End the stress run: the guest reads all back, and so does the host from the closed image."""
    end = await vm.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0), end
    assert await vm.guest.check() > 0
    return end


async def verified_closed(vm, spec, end):
    active = vm.disks[0].active
    await vm.quit()
    tools = Tools.of(vm.command[0])
    data = (await content(active, tools))[spec.offset : spec.offset + spec.length]
    verdict = check_acknowledged(data, spec, end.acked, end.issued)
    assert verdict.ok, verdict
    if active.spec.format != "raw":
        await active.check(tools)


# -- one pass


@pytest.mark.scenarios(*FORMATS)
async def test_every_format_uses_what_is_reserved(scenario, start_qemu, invariant):
    await check_use(await start_qemu(scenario, **with_guest(scenario)))


async def test_vhdx_uses_what_is_reserved(start_qemu, invariant):
    await check_use(await start_qemu(alone("vhdx", "64M")))  # the scenario's has but one block


async def check_use(vm):
    """Make room in the first disk, write something new, and see that it lies there."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk, *_] = await controller.disks()
        place = await find_place(disk)
        file = Path(place.file)
        size, before = file.stat().st_size, await disk.map()
        result = await disk.make_room(ROOM)
        assert result.file == str(file)
        assert result.full or result.room >= ROOM
        if place.start is None:  # the block in which the file ends may count
            assert result.room < ROOM + 4096
        again = await disk.make_room(ROOM)
        assert (again.before, again.reserved, again.room) == (result.room, 0, result.room)
        # Neither guest nor QEMU sees it.
        assert file.stat().st_size == size
        assert await disk.map() == before

        blocks = file.stat().st_blocks
        room = look(place, ROOM).room
        lowest = next(iter(room))[0] - (place.start or 0)
        if place.start is None:  # anywhere new, as far as QEMU tells where that is
            new = before.holes() or before.where(zero=True, data=False)
            lowest = next(iter(new))[0] if new else disk.size - (64 << 10)
        await vm.qemu_io(vm.disks[0], f"write -P 0x5a {lowest} 64K")
        await vm.qemu_io(vm.disks[0], "flush")
        used = room.total - look(place, ROOM).room.total
        assert used >= 64 << 10
        grown = (file.stat().st_blocks - blocks) * 512
        assert grown <= 64 << 10, "what was written took space of its own"


@pytest.mark.scenarios("parallels.yaml")
async def test_a_format_that_grows_otherwise_is_refused(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for refused in (disk.make_room(MIB), disk.keep_ahead(MIB)):
            with pytest.raises(UnsupportedError, match="parallels image grows is not known"):
                await refused
    await invariant.verify(vm)


# -- the purpose


@pytest.mark.parametrize("with_room", [True, False], ids=["room", "none"])
@pytest.mark.parametrize(
    ("make", "fmt"),
    [
        pytest.param(small_ext4, "qcow2", id="ext4-qcow2"),
        pytest.param(small_ext4, "raw", id="ext4-raw"),
        pytest.param(small_file_system, "qcow2", id="tmpfs-qcow2"),
    ],
)
async def test_a_host_that_is_full_fails_no_write_that_has_room(
    make, fmt, with_room, start_qemu, vm_dir, qemu_binary
):
    async with contextlib.AsyncExitStack() as stack:
        try:
            small = await stack.enter_async_context(make(vm_dir / "small", 40 * MIB))
        except UnsupportedError as error:
            pytest.skip(str(error))
        scenario = alone(fmt)
        vm = await start_qemu(await built(scenario, small / "images", qemu_binary), guest=True)
        promised = 8 * MIB
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            if with_room:
                # A cluster of qcow2 takes some metadata besides.
                result = await disk.make_room(promised + (MIB if fmt == "qcow2" else 0))
                assert result.reserved >= promised
        filler = filled(small)

        async def write():
            for offset in range(0, promised, MIB):
                await vm.guest.write(0, offset, MIB, seq=1 + offset // MIB, seed=7)
            await vm.guest.flush(0)

        if with_room:
            await write()
            assert (await vm.execute("query-status"))["status"] == "running"
        else:
            writing = asyncio.ensure_future(write())
            # QEMU stops the VM at ENOSPC, unless it is told to report it.
            await eventually(lambda: stopped(vm, writing), "run out of space")
            filler.unlink()
            await vm.execute("cont")
            await writing
        for offset in range(0, promised, MIB):
            wanted = stamped(offset, MIB, sequence=1 + offset // MIB, seed=7)
            assert await vm.guest.read(0, offset, MIB) == checksum(wanted)
        await vm.quit()


async def stopped(vm, writing):
    if writing.done():
        with pytest.raises(GuestError):
            writing.result()
        return True
    return (await vm.execute("query-status"))["status"] == "io-error"


# -- watching


@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
async def test_a_growing_image_never_runs_out(fmt, start_qemu, invariant, vm_dir, qemu_binary):
    vm = await start_qemu(await built(alone(fmt), vm_dir / "images", qemu_binary), guest=True)
    file = vm.disks[0].active.path
    spec = StressSpec(blocks=2048, block_size=65536, queue_depth=4, rate=40, flush_every=50)
    least = 8 * MIB
    async with watching(vm, 8 * MIB) as watch:
        await watch.begun()
        assert past_the_end(file) == 8 * MIB
        began = file.stat().st_size
        await vm.guest.stress(spec)
        while file.stat().st_size < began + 18 * MIB:
            assert not watch.task.done()
            least = min(least, past_the_end(file))
            await asyncio.sleep(0.02)
        end = await verified(vm, spec)
        assert least > 0
        # Each time some half of the room was gone, and the whole was made again.
        assert len(watch.told) >= 3
        assert all(4 * MIB < one.room <= 8 * MIB for one in watch.told)
        assert all(one.before < 4 * MIB for one in watch.told[1:])
        told = watch.told
        # The next one is set so that half of the room lies above.
        assert len(watch.thresholds()) >= len(told)
        assert {command for command, _ in watch.sent}.isdisjoint({"stop", "cont"})
    print(f"{fmt}: least {least / MIB:.1f} MiB, {len(told)} top-ups, {end.acked} writes")
    assert await armed(vm) == {}
    await invariant.verify(vm)
    await verified_closed(vm, spec, end)


@pytest.mark.parametrize("image", ["format: raw", "format: luks, secret: sesame", "data_file: d"])
async def test_raw_written_from_its_start(image, start_qemu, invariant, vm_dir, qemu_binary):
    text = f"about: Data at its place.\nimages:\n  - {{{image}, size: 24M}}\n"
    scenario = parse_scenario(text, "at-its-place")
    vm = await start_qemu(await built(scenario, vm_dir / "images", qemu_binary), guest=True)
    async with watching(vm, 8 * MIB) as watch:
        await watch.begun()
        place = await find_place(watch.disk)
        for at in range(24):
            # What the guest is about to write has its space.
            where = place.start + at * MIB
            await watch.until(
                lambda where=where: blank_ranges(place.file, where, MIB) == Ranges(), "reserve it"
            )
            await vm.guest.write(0, at * MIB, MIB, seq=at + 1, seed=3)
            # It writes no faster than a quarter of its room in a second.
            await asyncio.sleep(0.5)
        await watch.until(lambda: watch.told[-1].full, "say that no blank is left")
    # A block that qemu-img wrote had its space; the file system's own count, too.
    assert abs(sum(one.reserved for one in watch.told) - 24 * MIB) <= 8192
    offsets = [offset for _, offset in watch.thresholds() if offset]
    assert offsets == sorted(offsets)
    await invariant.verify(vm)


async def test_writes_far_above_the_room_make_no_storm(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await start_qemu(await built(alone("raw"), vm_dir / "images", qemu_binary), guest=True)
    spec = StressSpec(offset=128 * MIB, blocks=1024, queue_depth=16)
    loop = asyncio.get_running_loop()
    async with watching(vm, 8 * MIB) as watch:
        await watch.begun()
        began = loop.time()
        await vm.guest.stress(spec)
        await asyncio.sleep(6)
        end = await verified(vm, spec)
        sets, seconds = len(watch.thresholds()), loop.time() - began
        assert end.acked > 100
        # Again and again, since the event comes once; and not with every write.
        assert 2 <= sets <= seconds + 2, (sets, seconds)
        assert len(watch.told) == 1
        assert watch.told[0].room == 8 * MIB
    await invariant.verify(vm)
    await verified_closed(vm, spec, end)


async def taken_away(vm):
    """Take the room of a growing image away, as nobody should; its guest writes a little before."""
    file = vm.disks[0].active.path
    await vm.guest.write(0, 0, MIB, seq=1, seed=1)
    os.truncate(file, file.stat().st_size)
    assert past_the_end(file) == 0


async def test_a_look_finds_what_no_event_tells(
    start_qemu, invariant, vm_dir, qemu_binary, monkeypatch
):
    monkeypatch.setattr(ahead, "_LOOK", 0.3)
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary), guest=True)
    async with watching(vm, 8 * MIB) as watch:
        await watch.begun()
        await taken_away(vm)
        await watch.until(lambda: len(watch.thresholds()) == 2, "make room again")
        assert (watch.told[1].before, watch.told[1].room) == (0, 8 * MIB)
        (_, first), (_, second) = watch.thresholds()
        assert second > first
    await invariant.verify(vm)


@pytest.mark.parametrize("command", ["qom-set", "block-set-write-threshold"])
async def test_given_up_between_two_thresholds(
    command, start_qemu, invariant, vm_dir, qemu_binary, monkeypatch
):
    monkeypatch.setattr(ahead, "_LOOK", 0.3)
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary), guest=True)
    async with watching(vm, 8 * MIB) as watch:
        await watch.begun()
        watch.cancel_at = command  # the first threshold is set still
        await taken_away(vm)
        await asyncio.wait({watch.task})
        assert watch.task.cancelled()
        assert await armed(vm) == {}
        assert await locks(vm) == []
    await invariant.verify(vm)


@pytest.mark.scenarios("stress-chain.yaml")
async def test_a_snapshot_is_followed_and_a_commit(
    scenario, start_qemu, invariant, vm_dir, qemu_binary, monkeypatch
):
    monkeypatch.setattr(ahead, "_LOOK", 0.3)
    images = await built(scenario, vm_dir / "images", qemu_binary)
    vm = await start_qemu(images, guest=True)
    spec = StressSpec(offset=16 * MIB, blocks=1024, queue_depth=4, rate=100, flush_every=50)
    base = vm.disks[0].active.path
    overlay = vm_dir / "overlay.qcow2"
    async with watching(vm, 4 * MIB) as watch:
        await watch.begun()
        old = await armed_node(vm)
        await vm.guest.stress(spec)
        async with qmpblock.connect(vm.second_monitor_path) as controller:
            disk = await controller.disk("vd0")
            await disk.snapshot(overlay)
            await watch.until(lambda: watch.told[-1].file == str(overlay), "follow")
            await eventually(lambda: only_armed(vm, lambda node: node != old), "move")
            assert past_the_end(overlay) > 2 * MIB
            async with disk.commit(base="@1") as job:
                job.complete()
            await watch.until(lambda: watch.told[-1].file == str(base), "follow back")
            await eventually(lambda: only_armed(vm, lambda node: node == old), "move back")
        end = await verified(vm, spec)
    overlay.unlink()
    await invariant.verify(vm)
    await vm.quit()
    assert end.acked > 0


async def only_armed(vm, wanted):
    found = await armed(vm)
    return len(found) == 1 and wanted(next(iter(found)))


async def test_full_allocation_goes_on_meanwhile(
    start_qemu, invariant, vm_dir, qemu_binary, monkeypatch
):
    monkeypatch.setattr(ahead, "_LOOK", 0.1)
    scenario = alone("qcow2", "32M")
    vm = await start_qemu(await built(scenario, vm_dir / "images", qemu_binary), guest=True)
    spec = StressSpec(blocks=1024, queue_depth=4, rate=200, flush_every=50)
    async with watching(vm, 4 * MIB) as watch:
        await watch.begun()
        node = await armed_node(vm)
        await vm.guest.stress(spec)
        async with qmpblock.connect(vm.second_monitor_path) as controller:
            disk = await controller.disk("vd0")
            # Several slices, each with an overlay of ours on top for a while.
            result = await disk.allocate(full=True, speed=8 * MIB)
            assert result.reserved > 16 * MIB
            assert (await disk.map()).holes() == Ranges()
        end = await verified(vm, spec)
        await watch.until(lambda: watch.told[-1].room >= 2 * MIB, "have room again")
        assert {name for name, _ in watch.thresholds()} == {node}
        assert {one.file for one in watch.told} == {str(vm.disks[0].active.path)}
        await eventually(lambda: only_armed(vm, lambda name: name == node), "be armed again")
    await invariant.verify(vm)
    await verified_closed(vm, spec, end)


async def test_an_image_that_is_only_read_for_a_moment_is_looked_at_again(
    start_qemu, vm_dir, qemu_binary, monkeypatch
):
    """An overlay may come on top between a look at the disk and what is reserved in its file."""
    monkeypatch.setattr(ahead, "_LOOK", 0.05)
    left = [1, 0, 2]  # how often it is refused: at the first attempt, at none, and then at both
    fill = ahead.fill

    async def refused(*arguments):
        if left[0]:
            left[0] -= 1
            raise UnsupportedError("it is not open for writing")
        return await fill(*arguments)

    monkeypatch.setattr(ahead, "fill", refused)
    vm = await start_qemu(await built(alone("qcow2"), vm_dir / "images", qemu_binary))
    async with watching(vm, 4 * MIB) as watch:
        await watch.begun()
        assert left.pop(0) == 0
    async with watching(vm, 8 * MIB) as watch:
        await watch.until(lambda: watch.told and watch.told[-1].room >= 8 * MIB, "make room")
        left.pop(0)
    async with watching(vm, 16 * MIB) as watch:
        await watch.fails(UnsupportedError, "not open for writing")
    assert await locks(vm) == []


async def test_two_disks_of_one_connection(start_qemu, invariant, vm_dir, qemu_binary):
    a = (await built(alone("qcow2"), vm_dir / "a", qemu_binary)).disks[0]
    b = (await built(alone("raw"), vm_dir / "b", qemu_binary)).disks[0]
    from dataclasses import replace

    b = replace(b, spec=replace(b.spec, name="d1", attach=replace(b.spec.attach, id="vd1")))
    vm = await start_qemu([a, b], guest=True)
    told = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        tasks = [
            asyncio.ensure_future(
                (await controller.disk(name)).keep_ahead(4 * MIB, tell=told.append)
            )
            for name in ("vd0", "vd1")
        ]
        await eventually(lambda: len_is(armed(vm), 2), "watch both")
        for number in (0, 1):
            await vm.guest.write(number, 0, 3 * MIB, seq=1, seed=2)
        await eventually(lambda: len(told) == 4, "make room for both")
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert {one.disk for one in told[2:]} == {"vd0", "vd1"}
    await invariant.verify(vm)


async def len_is(coming, number):
    return len(await coming) == number


# -- others


async def test_a_foreign_threshold_is_kept(start_qemu, invariant, vm_dir, qemu_binary, monkeypatch):
    monkeypatch.setattr(ahead, "_LOOK", 0.3)
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary), guest=True)
    theirs = {"d0-file": 99 * MIB}

    async def set_theirs(offset=99 * MIB):
        await vm.execute(
            "block-set-write-threshold", **{"node-name": "d0-file", "write-threshold": offset}
        )

    await set_theirs()
    file = vm.disks[0].active.path
    async with watching(vm, 4 * MIB) as watch:
        error = await watch.fails(BusyError, "somebody has set a write threshold")
    assert "nothing of ours" in error.standing
    assert await armed(vm) == theirs
    assert past_the_end(file) == 0
    assert await locks(vm) == []

    # And one that takes the place of ours while we watch.
    await set_theirs(0)
    async with watching(vm, 4 * MIB) as watch:
        await watch.begun()
        await set_theirs()
        await vm.guest.write(0, 0, 3 * MIB, seq=1, seed=1)
        await watch.fails(BusyError, "somebody has set a write threshold")
    assert await armed(vm) == theirs
    await set_theirs(0)
    await invariant.verify(vm)


async def test_one_watcher_a_disk(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary))
    async with watching(vm, 4 * MIB) as watch:
        await watch.begun()
        await armed_node(vm)
        mine = await armed(vm)
        async with watching(vm, MIB, address=vm.second_monitor_path) as second:
            words = f"holds qmpblock-ahead-vd0.* process {os.getpid()} "
            await second.fails(BusyError, words)
        assert await armed(vm) == mine
        assert not watch.task.done()
        # One pass needs no lock.
        async with qmpblock.connect(vm.second_monitor_path) as controller:
            assert (await (await controller.disk("vd0")).make_room(8 * MIB)).room == 8 * MIB
            [left] = await controller.recover()
        assert left.steps[0].verb == "leave"
        assert await armed(vm) == mine
    await invariant.verify(vm)


async def test_no_space_is_told_and_tried_again(
    start_qemu, invariant, vm_dir, qemu_binary, monkeypatch
):
    monkeypatch.setattr(ahead, "_LOOK", 0.3)
    async with contextlib.AsyncExitStack() as stack:
        try:
            small = await stack.enter_async_context(small_file_system(vm_dir / "small", 32 * MIB))
        except UnsupportedError as error:
            pytest.skip(str(error))
        vm = await start_qemu(await built(alone(), small / "images", qemu_binary), guest=True)
        filler = fill_up(small, leave=MIB)
        async with watching(vm, 8 * MIB) as watch:
            await watch.until(lambda: watch.told, "tell")
            [first] = watch.told
            assert isinstance(first.error, Error)
            assert "No space left" in str(first.error)
            assert await armed(vm) == {}
            filler.unlink()
            await watch.until(lambda: len(watch.told) == 2, "try again")
            assert (watch.told[1].error, watch.told[1].room) == (None, 8 * MIB)
            await watch.begun()
            # No FIEMAP here: it knows by its own account when half is gone.
            await vm.guest.write(0, 0, 5 * MIB, seq=1, seed=1)
            await watch.until(lambda: len(watch.told) == 3, "make room again")
            assert watch.told[2].reserved > 4 * MIB
        await vm.quit()


async def test_what_must_stay_free_stays_free(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary))
    async with watching(vm, 8 * MIB, keep_free=1 << 60) as watch:
        await watch.until(lambda: watch.told, "tell")
        assert "are to stay so" in str(watch.told[0].error)
    assert past_the_end(vm.disks[0].active.path) == 0
    await invariant.verify(vm)


@pytest.mark.scenarios("device-virtio-scsi.yaml")
async def test_an_unplugged_disk_ends_its_watch(scenario, start_qemu, invariant, monkeypatch):
    monkeypatch.setattr(ahead, "_LOOK", 0.3)
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        name = (await controller.disks())[0].name
    async with watching(vm, MIB, disk=name) as watch:
        await watch.begun()
        await unplug(vm, vm.disks[0])
        await watch.fails(NotFoundError, "unplugged")
    assert await armed(vm) == {}
    assert await locks(vm) == []
    invariant.forget(vm)


async def test_the_end_of_the_vm_is_the_end(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary))
    async with watching(vm, MIB) as watch:
        await watch.begun()
        await vm.quit()
        await asyncio.wait({watch.task})
        assert watch.task.exception() is None


# -- cancelled anywhere


async def test_cancelled_at_every_command(start_qemu, invariant, vm_dir, qemu_binary):
    vm = await start_qemu(await built(alone(), vm_dir / "images", qemu_binary))
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        for number in itertools.count(1):
            if await cancelled_at(vm, controller.monitor, disk, number):
                break
            assert await armed(vm) == {}, number
            assert await locks(vm) == [], number
        assert number > 10
    await invariant.verify(vm)


async def cancelled_at(vm, monitor, disk, number):
    """Cancel a watch when it sends its Nth command; return whether it was armed before that."""
    real, sent, done = monitor._execute, itertools.count(1), asyncio.Event()
    task = asyncio.ensure_future(disk.keep_ahead(MIB))

    async def execute(command, arguments):
        if next(sent) == number:
            task.cancel()
        try:
            return await real(command, arguments)
        finally:
            if command == "block-set-write-threshold":
                done.set()

    monitor._execute = execute
    waiting = asyncio.ensure_future(done.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    passed = not task.cancelling()
    task.cancel()
    await asyncio.wait({task})
    monitor._execute = real
    assert task.cancelled(), task
    return passed


async def test_nothing_is_reserved_in_what_qemu_may_only_read(start_qemu, vm_dir):
    """Whoever answers a monitor may claim to write to it: the kernel knows better."""
    path = vm_dir / "secret.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    node = f"raw,node-name=d0,read-only=on,file.driver=file,file.filename={path}"
    vm = await start_qemu(extra=["-blockdev", node, "-device", "virtio-blk-pci,drive=d0"])
    with pytest.raises(UnsupportedError, match="not open for writing"):
        await reserve_ranges(str(path), vm.pid, [(0, MIB)], speed=Speed())
    assert path.stat().st_blocks == 0
