"""Jobs in the hands of their user, of another controller, and of a guest that outruns them."""

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import replace

import peers
import pytest
from disturbed import (
    OPERATIONS,
    SLOW,
    SPEC,
    Content,
    begin,
    build_chain,
    copying,
    ended,
    locks,
    nothing_of_ours,
    ready,
    seen,
    undisturbed_guest,
    until,
    verify,
)

import qmpblock
from qmpblock.errors import BusyError, CommandError, JobError, StalledError
from qmpblock.names import LockKind, lock_kind
from qmpblock.qemu.job import Job
from qmpblock.testing.faults import slow
from qmpblock.testing.images import Tools
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live
CHAIN = pytest.mark.scenarios("chain-3.yaml")
OPERATION = pytest.mark.parametrize("operation", OPERATIONS)
LEFT = {"stream": 1, "commit": 2, "pivot": 1}  # layers afterwards


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


# -- two controllers


@CHAIN
@OPERATION
async def test_one_of_two_controllers_wins(operation, built, start_qemu, invariant, vm_dir):
    vm = await start_qemu(built)
    async with (
        qmpblock.connect(vm.monitor_path) as first,
        qmpblock.connect(vm.second_monitor_path) as second,
    ):
        winner, loser = await first.disk("vd0"), await second.disk("vd0")
        async with begin(winner, operation, speed=SLOW) as job:
            await copying(job)

            async def attempt(what):
                if what == "snapshot":
                    await loser.snapshot(vm_dir / "images" / "never.qcow2")
                else:
                    async with begin(loser, what):
                        pass

            for what in (*OPERATIONS, "snapshot"):
                with pytest.raises(BusyError, match=f"process {os.getpid()} on ") as caught:
                    await attempt(what)
                assert caught.value.exit_code == 1
                assert "qmpblock-disk-vd0" in caught.value.message
            assert not (vm_dir / "images" / "never.qcow2").exists()
            await job.set_speed(0)
        assert job.outcome.changed
        await nothing_of_ours(vm)
        await loser.snapshot(vm_dir / "images" / "now.qcow2")
        assert len(loser.chain.layers) == LEFT[operation] + 1
    await nothing_of_ours(vm)
    invariant.forget(vm)


@CHAIN
async def test_of_many_at_once_exactly_one_wins(built, start_qemu, invariant):
    vm = await start_qemu(built)
    async with (
        qmpblock.connect(vm.monitor_path) as first,
        qmpblock.connect(vm.second_monitor_path) as second,
    ):
        disks = [await (first, second)[n % 2].disk("vd0") for n in range(6)]

        async def run(disk):
            async with disk.stream(speed=SLOW) as job:
                await copying(job)
                await job.set_speed(0)
            return job.outcome

        found = await asyncio.gather(*map(run, disks), return_exceptions=True)
    done = [one for one in found if not isinstance(one, BaseException)]
    assert [outcome.changed for outcome in done] == [True]
    assert all(isinstance(one, BusyError) for one in found if one not in done), found
    await nothing_of_ours(vm)
    invariant.forget(vm)


@pytest.mark.scenarios("two-disks-one-base.yaml", "several-disks.yaml")
async def test_different_disks_are_worked_on_at_once(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    async with (
        qmpblock.connect(vm.monitor_path) as first,
        qmpblock.connect(vm.second_monitor_path) as second,
    ):
        names = [disk.name for disk in await first.disks()][:2]
        one, two = await first.disk(names[0]), await second.disk(names[1])
        for number, disk in enumerate((one, two)):
            await disk.snapshot(vm.image_directories()[0] / f"overlay{number}.qcow2")
        async with one.commit(base="@1") as left, two.commit(base="@1") as right:
            assert len([one for one in await locks(vm) if lock_kind(one) is LockKind.DISK]) == 2
            left.complete()
            right.complete()
        assert left.outcome.changed
        assert right.outcome.changed
    await nothing_of_ours(vm)
    invariant.forget(vm)


# -- the job in its user's hands


@CHAIN
@OPERATION
async def test_a_job_is_followed_and_steered(
    operation, built, content, start_qemu, tools, invariant
):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    looks = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with begin(disk, operation, speed=SLOW) as job:
            await copying(job)
            await job.pause()
            paused = await seen(job, lambda p: p.phase == "paused", "paused")
            await asyncio.sleep(1)
            assert job.progress.done == paused.done
            assert job.progress.idle == 0  # it is not meant to move
            await job.resume()
            await seen(job, lambda p: p.phase == "copying", "copying again")
            await job.set_speed(0)
            async for look in job:
                looks.append(look)
                if look.ready:
                    job.complete()
                    job.complete()
        with pytest.raises(CommandError):
            await job.pause()
    assert [look.status for look in looks][-1] == "concluded"
    assert looks[-1].phase == "ended"
    assert all(look.done >= 0 for look in looks)
    assert [look.done for look in looks] == sorted(look.done for look in looks)
    assert job.outcome.changed
    assert job.outcome.seconds > 1
    await nothing_of_ours(vm)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2 if operation == "pivot" else 0)


@CHAIN
async def test_rate_and_eta_are_told(built, start_qemu, invariant):
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.stream(speed=SLOW) as job:
            look = await seen(job, lambda p: p.rate > 0 and p.eta, "a rate and an ETA")
            assert 0 < look.done < look.total
            assert look.remaining == look.total - look.done
            assert look.eta == pytest.approx(look.remaining / look.rate)
            await job.set_speed(0)
    invariant.forget(vm)


@CHAIN
@OPERATION
async def test_leaving_early_waits_for_the_end(operation, built, start_qemu, invariant):
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with begin(disk, operation):
            pass
        assert len(disk.chain.layers) == LEFT[operation]
        async with begin(disk, "stream") as again:
            async for _ in again:
                pass
        assert again.outcome.changed is (operation == "commit")
    await nothing_of_ours(vm)
    invariant.forget(vm)


@CHAIN
@OPERATION
@pytest.mark.parametrize("moment", ["at-once", "copying", "paused", "ready"])
@pytest.mark.parametrize("how", ["raise", "cancel"])
async def test_given_up_it_is_undone(
    how, moment, operation, built, content, start_qemu, tools, invariant
):
    if moment == "ready" and operation != "pivot":
        moment = "copying"  # only a pivoting job is ever ready
    vm = await start_qemu(built, guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)
    reached = asyncio.Event()

    async def work(disk):
        async with begin(disk, operation, speed=0 if moment == "ready" else SLOW) as job:
            if moment == "ready":
                await ready(job)
            elif moment != "at-once":
                await copying(job)
            if moment == "paused":
                await job.pause()
            if how == "raise":
                raise LookupError
            reached.set()
            await asyncio.sleep(3600)

    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        task = asyncio.create_task(work(disk))
        if how == "cancel":
            await until(lambda: reached.is_set() or task.done(), "the moment of the end")
            task.cancel()
        with pytest.raises(LookupError if how == "raise" else asyncio.CancelledError):
            await task
        await disk.refresh()
        assert len(disk.chain.layers) == 3
        assert disk.device.jobs == ()
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


@CHAIN
@OPERATION
async def test_cancelled_at_any_moment_it_is_done_or_undone(
    operation, built, content, start_qemu, tools, invariant
):
    """At full speed: from before the lock is taken until after the pivot."""
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    undone = 0

    async def work(disk):
        async with begin(disk, operation):
            pass

    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        for step in range(200):
            task = asyncio.create_task(work(disk))
            await asyncio.sleep(0.004 * step)
            task.cancel()
            await asyncio.wait({task})
            await nothing_of_ours(vm)
            await disk.refresh()
            assert disk.device.jobs == ()
            if len(disk.chain.layers) == LEFT[operation]:
                break
            assert task.cancelled(), task
            assert len(disk.chain.layers) == 3
            undone += 1
        else:
            pytest.fail("it never came to its end")
    assert undone > 3
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2 if operation == "pivot" else 0)


@CHAIN
@OPERATION
async def test_cancelled_by_somebody_else_it_is_undone(
    operation, built, content, start_qemu, tools, invariant
):
    vm = await start_qemu(built, guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)

    async def work(disk):
        async with begin(disk, operation, speed=SLOW) as job:
            await copying(job)
            await vm.execute("job-cancel", id=job.id)
            await ended(job)

    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(JobError, match="anceled") as caught:
            await work(disk)
        assert caught.value.standing == "the chain is as it was; nothing of ours is left in the VM"
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


@CHAIN
@pytest.mark.parametrize("operation", ["commit", "pivot"])
async def test_dismissed_by_somebody_else_it_says_what_stands(
    operation, built, content, start_qemu, tools, invariant, monkeypatch
):
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    look = Job.look

    async def faster(self):
        info = await look(self)
        if info is not None and info["status"] == "concluded":
            await vm.execute("job-dismiss", id=self.id)
            return None
        return info

    async def work(disk):
        async with begin(disk, operation):
            pass

    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        monkeypatch.setattr(Job, "look", faster)
        with pytest.raises(JobError, match="dismissed it") as caught:
            await work(disk)
        assert "it was done all the same" in caught.value.standing
        await disk.refresh()
        assert len(disk.chain.layers) == LEFT[operation]
    await nothing_of_ours(vm)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2 if operation == "pivot" else 0)


# -- standing still


@contextlib.asynccontextmanager
async def served(path, socket):
    """Serve an image file by an NBD server, to be stopped; as a storage that hangs."""
    command = ["qemu-nbd", "-t", "-f", "raw", "-e", "8", "-k", str(socket), str(path)]
    server = await asyncio.create_subprocess_exec(*command)
    try:
        await until(lambda: peers.listens(socket), "the NBD server")
        yield server
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        await server.wait()


@CHAIN
@pytest.mark.parametrize("operation", ["stream", "commit", "pivot-ready"])
async def test_hung_storage_is_a_stall_and_owed_until_it_answers(
    operation, built, start_qemu, vm_dir
):
    """The job's I/O neither ends nor fails, so that QEMU cannot cancel it either."""
    above = built.disks[0].active.describe(node="d0", live=True)
    base, above["backing"]["backing"] = above["backing"]["backing"], "d0-2"
    socket = vm_dir / "nbd"
    storage = {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}}
    base |= {"file": {"node-name": "d0-2-file", **storage}}
    base |= {"read-only": True, "auto-read-only": True}
    extra = ["-blockdev", json.dumps(base), "-blockdev", json.dumps(above)]
    extra += ["-device", "virtio-blk-pci,drive=d0,id=vd0"]
    image = built.disks[0].active.chain()[2].path
    os.truncate(image, 32 << 20)  # NBD cannot make it longer
    async with served(image, socket) as server:
        vm = await start_qemu([], extra=extra)

        async def work(disk):
            name = operation.removesuffix("-ready")
            async with begin(disk, name, speed=0 if name == "pivot" else SLOW) as job:
                await (ready(job) if name == "pivot" else copying(job))
                server.send_signal(signal.SIGSTOP)
                if name == "pivot":
                    await vm.hmp(
                        'qemu-io -d /machine/peripheral/vd0/virtio-backend "aio_write 0 1M"'
                    )
                    await asyncio.sleep(0.5)
                await job.set_speed(0)

        async with qmpblock.connect(vm.monitor_path, stall=2.0) as controller:
            disk = await controller.disk("vd0")
            with pytest.raises(StalledError, match="qmpblock-") as caught:
                await work(disk)
            assert caught.value.standing.startswith("left in the VM: the lock qmpblock-disk-vd0")
            assert "qmpblock recover" in caught.value.remedy
            server.send_signal(signal.SIGCONT)
            await controller.recover()
            await disk.refresh()
            assert len(disk.chain.layers) == 3
        await nothing_of_ours(vm)
        await vm.quit()


@CHAIN
@OPERATION
async def test_resting_to_keep_within_its_speed_is_no_stall(
    operation, built, start_qemu, invariant
):
    """An active commit does all at once, and then nothing for nine seconds."""
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path, stall=1.0) as controller:
        disk = await controller.disk("vd0")
        async with begin(disk, operation, speed=SLOW) as job:
            pass
        assert job.outcome.seconds > 2
    invariant.forget(vm)


@CHAIN
async def test_a_stopped_qemu_is_a_stall(built, start_qemu):
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path, stall=1.0) as controller:
        disk = await controller.disk("vd0")

        async def work():
            async with disk.stream(speed=SLOW) as job:
                await copying(job)
                os.kill(vm.pid, signal.SIGSTOP)
                await ended(job)

        with pytest.raises(StalledError, match="QEMU did not answer"):
            await work()
        os.kill(vm.pid, signal.SIGCONT)
        # The same process may go on: what the first run left is undone first.
        with pytest.raises(LookupError):
            async with disk.stream(speed=SLOW):
                raise LookupError
    await nothing_of_ours(vm)


# -- a guest that is faster than the job

FAST = StressSpec(
    offset=SPEC.offset, blocks=SPEC.blocks, block_size=4096, queue_depth=16, seed=SPEC.seed
)


async def outrun(built, start_qemu, rate, spec=FAST):
    """Start a VM whose guest writes faster than its base takes it."""
    [disk] = built.disks
    vm = await start_qemu([slow(disk, rate, layer=2)], guest=True)
    await vm.guest.stress(spec)
    return vm


BACKEND = "/machine/peripheral/vd0/virtio-backend"
NO_IOPS = {"iops_rd": 0, "iops_wr": 0}


async def io_limits(vm):
    [disk] = [entry for entry in await vm.execute("query-block") if entry.get("inserted")]
    keys = ("bps", "iops", "group")
    return {k: v for k, v in disk["inserted"].items() if k.startswith(keys)}


@CHAIN
async def test_without_convergence_it_says_so_and_undoes(
    built, content, start_qemu, tools, invariant
):
    vm = await outrun(built, start_qemu, 2 << 20)
    expect_left_writable(invariant, vm, "pivot")

    async def work(disk):
        async with disk.commit() as job:
            await seen(job, lambda p: p.lagging > 1, "lagging")

    async with qmpblock.connect(vm.monitor_path, stall=4.0) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(StalledError, match="does not converge: the guest writes") as caught:
            await work(disk)
        assert "--throttle-guest" in caught.value.remedy
        assert caught.value.standing == "the chain is as it was; nothing of ours is left in the VM"
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


@CHAIN
async def test_a_speed_at_which_it_never_gets_there_is_told_of(built, start_qemu, invariant):
    """It rests when it has copied all that it knew of, and by then all of that is dirty again."""
    [disk] = built.disks
    vm = await start_qemu([disk], guest=True)
    await vm.guest.stress(FAST)
    expect_left_writable(invariant, vm, "pivot")
    async with qmpblock.connect(vm.monitor_path, stall=8.0) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(StalledError, match="does not converge") as caught:
            async with disk.commit(speed=4 << 20):
                pass
        assert "raise --speed" in caught.value.remedy
    await nothing_of_ours(vm)
    await undisturbed_guest(vm)
    await invariant.verify(vm)


@CHAIN
@pytest.mark.parametrize("limited", [False, True])
async def test_a_guest_that_is_slowed_down_lets_it_pivot(
    limited, built, content, start_qemu, tools, invariant
):
    # Few enough in flight for the base to take them before the guest has written again (F21).
    vm = await outrun(built, start_qemu, 24 << 20, replace(FAST, queue_depth=1))
    if limited:
        limits = {"bps": 90 << 20, "bps_rd": 0, "bps_wr": 0, "iops": 50_000, "iops_max": 60_000}
        await vm.control.execute("block_set_io_throttle", {"id": BACKEND, **limits, **NO_IOPS})
    before = await io_limits(vm)
    slowed = []
    async with qmpblock.connect(vm.monitor_path, stall=60.0) as controller:
        disk = await controller.disk("vd0")
        async with disk.commit(throttle_guest=16 << 10) as job:
            async for look in job:
                if look.ready:
                    job.complete()
                slowed.append((await io_limits(vm)).get("bps"))
        assert job.outcome.pivoted
    assert 16 << 10 in slowed
    assert await io_limits(vm) == before
    await nothing_of_ours(vm)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2)


@CHAIN
async def test_slowing_the_guest_down_may_not_suffice(built, content, start_qemu, tools, invariant):
    """QEMU lets what it holds back through each time that it looks whether all is clean.

    A guest whose VM is paused writes nothing, however slow the base is.
    """
    vm = await outrun(built, start_qemu, 4 << 20)
    expect_left_writable(invariant, vm, "pivot")
    before = await io_limits(vm)
    slowed = []

    async def work(disk):
        async with disk.commit(throttle_guest=16 << 10) as job:
            async for look in job:
                if look.ready:
                    job.complete()
                slowed.append((await io_limits(vm)).get("bps"))

    async with qmpblock.connect(vm.monitor_path, stall=2.0) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(StalledError, match="does not converge") as caught:
            await work(disk)
        assert "pause the VM while this runs again" in caught.value.remedy
    assert 16 << 10 in slowed
    assert await io_limits(vm) == before
    await nothing_of_ours(vm)
    await invariant.verify(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        await vm.control.execute("stop")
        async with disk.commit() as job:
            pass
        await vm.control.execute("cont")
        assert job.outcome.pivoted
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2)
