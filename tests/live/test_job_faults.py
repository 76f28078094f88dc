"""Faults in the middle of a stream, a commit and a pivot, with the guest writing throughout.

Each has its documented outcome (docs/safety.md), leaves the VM as the invariant says, and
loses no write: the guest looks at every block, and the host at every byte.
"""

import asyncio
import os
import shutil
import signal
import socket
from dataclasses import replace

import pytest
from disturbed import (
    MOMENTS,
    OPERATIONS,
    SLOW,
    SPEC,
    Content,
    begin,
    build_chain,
    copying,
    ended,
    locks,
    no_journals,
    nothing_of_ours,
    ready,
    seen,
    struck,
    undisturbed_guest,
    until,
    verify,
    writes_on,
    written_layer,
)

import qmpblock
from qmpblock.errors import (
    BusyError,
    DisconnectedError,
    JobError,
    StalledError,
    UnsupportedError,
)
from qmpblock.testing.faults import fill_up, inject, small_file_system, unplug
from qmpblock.testing.images import Tools

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]
MOMENT = pytest.mark.parametrize(
    ("operation", "at_ready"), MOMENTS, ids=["stream", "commit", "pivot", "pivot-ready"]
)
OPERATION = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def tools(qemu_binary):
    return Tools.of(qemu_binary)


@pytest.fixture
async def built(scenario, vm_dir, qemu_binary):
    return await build_chain(scenario, vm_dir, qemu_binary)


@pytest.fixture
async def content(built, tools):
    return await Content.of(built, tools)


def expect_left_writable(invariant, vm, operation):
    """A cancelled active commit leaves the base open for writing: QEMU 7.2's doing."""
    if operation == "pivot" and vm.version < (8,):
        invariant.expect("open file: .*/d0-0.qcow2 for reading", "node: d0-2", "edge: d0-2")


# -- no room


async def small(directory, built, operation):
    """Move the image that will be written to onto a small file system; it keeps its name."""
    image = built.disks[0].active.chain()[written_layer(operation)]
    moved = directory / image.path.name
    shutil.move(image.path, moved)
    image.path.symlink_to(moved)


@OPERATION
async def test_without_room_a_job_waits_and_goes_on(
    operation, built, content, start_qemu, vm_dir, tools, invariant
):
    try:
        async with small_file_system(vm_dir / "small", 24 << 20) as directory:
            await small(directory, built, operation)
            vm = await start_qemu(built, guest=True)
            await vm.guest.stress(SPEC)
            filler = fill_up(directory)
            async with qmpblock.connect(vm.monitor_path) as controller:
                disk = await controller.disk("d0")
                async with begin(disk, operation) as job:
                    waiting = await seen(job, lambda p: p.phase == "waiting for room", "full")
                    assert waiting.status == "paused"
                    assert waiting.errors > 0
                    await asyncio.sleep(2.5)  # it tries again meanwhile, in vain
                    assert job.progress.phase == "waiting for room"
                    filler.unlink()
                assert job.outcome.changed
            await nothing_of_ours(vm)
            done = await undisturbed_guest(vm)
            invariant.forget(vm)  # the chain is another one
            after = written_layer(operation) if operation == "pivot" else 0
            await verify(vm, tools, content, done, layer=after)
    except UnsupportedError as error:
        pytest.skip(str(error))


@OPERATION
async def test_given_up_while_it_waits_for_room(
    operation, built, content, start_qemu, vm_dir, tools, invariant
):
    try:
        async with small_file_system(vm_dir / "small", 24 << 20) as directory:
            await small(directory, built, operation)
            vm = await start_qemu(built, guest=True)
            expect_left_writable(invariant, vm, operation)
            await vm.guest.stress(SPEC)
            filler = fill_up(directory)
            async with qmpblock.connect(vm.monitor_path) as controller:
                disk = await controller.disk("d0")

                async def disturbed():
                    async with begin(disk, operation) as job:
                        await seen(job, lambda p: p.phase == "waiting for room", "full")
                        raise ZeroDivisionError

                with pytest.raises(ZeroDivisionError):
                    await disturbed()
                await disk.refresh()
                assert len(disk.chain.layers) == 3
            await nothing_of_ours(vm)
            filler.unlink()
            done = await undisturbed_guest(vm)
            await invariant.verify(vm)
            await verify(vm, tools, content, done)
    except UnsupportedError as error:
        pytest.skip(str(error))


# -- bad storage


@OPERATION
@pytest.mark.parametrize("side", ["read", "write"])
async def test_an_io_error_fails_the_job_and_changes_nothing(
    side, operation, built, content, start_qemu, tools, invariant
):
    [disk] = built.disks
    chain = disk.active.chain()
    # Data begins at 320 KiB of these files; new clusters are appended.
    layer, offset = {
        "read": ({"stream": 2, "commit": 1, "pivot": 1}[operation], (320 + 512) << 10),
        "write": (written_layer(operation), chain[written_layer(operation)].path.stat().st_size),
    }[side]
    faulty = inject(disk, f"{side}_aio", "EIO", layer=layer, offset=offset + 4096)
    vm = await start_qemu([faulty], guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path) as controller:
        found = await controller.disk("d0")
        with vm.control.subscribe("BLOCK_JOB_ERROR") as failures:
            with pytest.raises(JobError, match=r"Input/output error|I/O error") as caught:
                async with begin(found, operation):
                    pass
            actions = {event["data"]["action"] for event in failures.pending()}
        # On 7.2 no job ends by itself: that may not be while QEMU flushes (K34).
        assert actions == {"stop" if vm.version < (8,) else "report"}
        assert caught.value.standing == "the chain is as it was; nothing of ours is left in the VM"
        await found.refresh()
        assert len(found.chain.layers) == 3
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    if side == "write" and operation != "stream":
        invariant.forget(vm)  # QEMU lists blkdebug's options in another order after a reopen
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


# -- the guest's own doing


@MOMENT
async def test_a_guest_reset_disturbs_nothing(
    operation, at_ready, built, content, start_qemu, tools, invariant
):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")
        async with struck(disk, operation, at_ready=at_ready) as job:
            await writes_on(vm.guest, count=20)
            before = await vm.guest.progress()
            await vm.guest.reset()
            await job.set_speed(0)
        assert job.outcome.changed
    await nothing_of_ours(vm)
    invariant.forget(vm)
    assert before.acked > 0
    crashed = replace(before, flushed=before.acked)  # acknowledged to the guest, and QEMU lived
    layer = 2 if operation == "pivot" else 0
    await verify(vm, tools, content, crashed, crashed=True, layer=layer)


@MOMENT
@pytest.mark.parametrize("how", ["power-off", "kill"])
async def test_when_qemu_ends_the_controller_recovers_by_itself(
    how, operation, at_ready, built, content, start_qemu, tools
):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    last = None
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")

        async def disturbed():
            nonlocal last
            async with struck(disk, operation, at_ready=at_ready) as job:
                await writes_on(vm.guest, count=20)
                last = await vm.guest.progress()
                if how == "kill":
                    await vm.kill()
                else:
                    vm.expect_exit()
                    await vm.guest.power_off()
                    assert await vm.wait(30) == 0, vm.evidence()
                await ended(job)

        with pytest.raises(DisconnectedError) as caught:
            await disturbed()
    active = vm.disks[0].active.path
    assert f"QEMU has ended. start the VM from {active}: " in caught.value.standing
    assert caught.value.remedy is None
    no_journals(vm)
    assert last.acked > 0
    if how == "power-off":
        last = replace(last, flushed=last.acked)  # QEMU closed its images in order
    await verify(vm, tools, content, last, crashed=True)


@MOMENT
async def test_an_unplugged_disk_ends_its_job_in_order(
    operation, at_ready, built, content, start_qemu, tools, invariant
):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")
        async with struck(disk, operation, at_ready=at_ready) as job:
            await writes_on(vm.guest, count=20)
            last = await vm.guest.progress()
            await unplug(vm, "d0")
            await job.set_speed(0)
        layer = 2 if operation == "pivot" else 0
        active = vm.disks[0].active.chain()[layer].path
        assert job.outcome.active == str(active)
    await nothing_of_ours(vm)
    invariant.forget(vm)
    assert last.acked > 0
    last = replace(last, flushed=last.acked)
    await verify(vm, tools, content, last, crashed=True, layer=layer)


# -- the monitor


def cut(controller):
    """Break the connection under everybody's feet."""
    sock = controller.monitor._transport._client._writer.get_extra_info("socket")
    sock.shutdown(socket.SHUT_RDWR)


@MOMENT
async def test_after_a_cut_it_connects_again_and_undoes(
    operation, at_ready, built, content, start_qemu, tools, invariant
):
    vm = await start_qemu(built, guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")

        async def disturbed():
            async with struck(disk, operation, at_ready=at_ready) as job:
                cut(controller)
                await ended(job)

        with pytest.raises(DisconnectedError) as caught:
            await disturbed()
    assert caught.value.standing == (
        "connected again; the change was undone, and nothing of ours is left in the VM"
    )
    assert caught.value.remedy is None
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


@OPERATION
async def test_where_it_cannot_connect_again_it_says_how_to_recover(
    operation, built, content, start_qemu, tools, invariant, monkeypatch
):
    """Somebody else got hold of the monitor meanwhile."""
    monkeypatch.setattr("qmpblock.changes.change._RECONNECT", 0.5)
    waiting = socket.socket(socket.AF_UNIX)
    vm = await start_qemu(built, guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")

        async def disturbed():
            async with struck(disk, operation) as job:
                waiting.connect(vm.monitor_path)  # is served as soon as we are gone
                cut(controller)
                await ended(job)

        with pytest.raises(DisconnectedError) as caught:
            await disturbed()
    assert caught.value.standing.startswith("left in the VM: the lock qmpblock-disk-vd0")
    assert caught.value.remedy == f"run: qmpblock recover unix:{vm.monitor_path}"
    assert await locks(vm) == {"qmpblock-disk-vd0"}
    waiting.close()
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        [recovered] = await controller.recover()
        assert recovered.done is False
        assert await controller.recover() == []
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


@OPERATION
async def test_a_qemu_that_does_not_answer_is_undone_when_it_does(
    operation, built, content, start_qemu, tools, invariant
):
    """It is stopped for longer than the stall limit; the undoing is owed until it answers."""
    vm = await start_qemu(built, guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path, stall=1.0) as controller:
        disk = await controller.disk("d0")

        async def disturbed():
            async with struck(disk, operation) as job:
                os.kill(vm.pid, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(4.0, os.kill, vm.pid, signal.SIGCONT)
                await ended(job)

        with pytest.raises(StalledError) as caught:
            await disturbed()
    assert caught.value.standing == "left in the VM: the lock qmpblock-disk-vd0 and what it is for"
    assert caught.value.remedy == f"run: qmpblock recover unix:{vm.monitor_path}"
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        [recovered] = await controller.recover()
        assert recovered.done is False
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


# -- somebody else's jobs


async def foreign_backup(vm):
    """Start a job that is none of ours on the disk, and does not end."""
    await vm.execute(
        "blockdev-add", driver="null-co", node_name="theirs", size=16 << 20, read_zeroes=True
    )
    await vm.execute(
        "blockdev-backup", job_id="backup0", device="d0", target="theirs", sync="full", speed=1
    )


async def end_foreign(vm):
    await vm.execute("block-job-cancel", device="backup0", force=True)

    async def gone():
        return not await vm.execute("query-jobs")

    await until(gone, "the end of the foreign job")
    await vm.execute("blockdev-del", node_name="theirs")


@OPERATION
async def test_a_foreign_job_is_named_and_nothing_is_touched(operation, built, start_qemu):
    vm = await start_qemu(built)
    await foreign_backup(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")
        with pytest.raises(
            BusyError, match=r"the job backup0 \(backup, running\) runs on vd0"
        ) as e:
            async with begin(disk, operation):
                pass
        assert e.value.standing == "nothing was touched"
    assert [job["id"] for job in await vm.execute("query-jobs")] == ["backup0"]
    await end_foreign(vm)


@OPERATION
async def test_a_foreign_job_that_comes_just_before_ours(operation, built, start_qemu, monkeypatch):
    """After the plan, before the lock: seen when the chain is looked at again."""
    from qmpblock.changes.change import Change

    vm = await start_qemu(built)
    begin_change = Change.begin

    async def begin_late(self):
        await foreign_backup(vm)
        await begin_change(self)

    monkeypatch.setattr(Change, "begin", begin_late)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")
        with pytest.raises(BusyError, match=r"the job backup0 .* runs on vd0"):
            async with begin(disk, operation):
                pass
    assert [job["id"] for job in await vm.execute("query-jobs")] == ["backup0"]
    await end_foreign(vm)
    await nothing_of_ours(vm)


@OPERATION
async def test_a_foreign_job_that_comes_while_ours_runs(
    operation, built, content, start_qemu, tools, invariant
):
    """QEMU keeps it off the disk, or lets it in: either way both end as they should."""
    from qmpblock.errors import CommandError

    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    let_in = True
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")
        async with begin(disk, operation, speed=SLOW) as job:
            await copying(job)
            try:
                await foreign_backup(vm)
            except CommandError as refused:
                assert "busy" in str(refused)
                let_in = False
                await vm.execute("blockdev-del", node_name="theirs")
            await job.set_speed(0)
        assert job.outcome.changed
    jobs = [job["id"] for job in await vm.execute("query-jobs")]
    assert jobs == (["backup0"] if let_in else [])
    if let_in:
        await end_foreign(vm)
    await nothing_of_ours(vm)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2 if operation == "pivot" else 0)


async def test_the_guest_goes_on_during_a_long_ready(built, content, start_qemu, tools, invariant):
    """A job that is ready waits for `complete`, keeps up with the guest, and then pivots."""
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("d0")
        async with begin(disk, "pivot") as job:
            await ready(job)
            await writes_on(vm.guest, count=100)
            assert job.progress.ready
        assert job.outcome.pivoted
    await nothing_of_ours(vm)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2)
