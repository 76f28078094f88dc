"""K9: an iothread that polls forgets a guest's requests in a drain; so none polls while we drain.

The iothread here polls for a second at a time, and is made to end that while a pivot is pending:
QEMU 7.2 then forgets a queue at nearly every pivot, as it does by itself now and then on a busy
host. On a QEMU that does not, all is the same but that nothing needs to be done about it.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys

import pytest
from dying import deadly
from killing import CHAIN, IOTHREAD

import qmpblock
from qmpblock.changes import finalize as driving
from qmpblock.errors import JobError
from qmpblock.jobcontrol import steer
from qmpblock.names import guard_name
from qmpblock.qemu import polling
from qmpblock.qemu.job import Job
from qmpblock.testing.hang import look, wake
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

ONE = parse_scenario("about: One disk.\nattach: {iothread: one}\nimages: [{size: 8M}]\n", "one")
THREAD = "iothread-d0-0"
POLL = 10**9  # nanoseconds
ROUNDS = 8  # until a guest hangs that is to; the first one nearly always does
AFFECTED = (10, 0, 0)
#: All commands that we know to drain: every one must come while no iothread polls.
DRAINS = {
    "block-commit",
    "block-dirty-bitmap-add",
    "block-export-add",
    "block-export-del",
    "block-stream",
    "block_set_io_throttle",
    "blockdev-add",
    "blockdev-del",
    "blockdev-reopen",
    "human-monitor-command",
    "job-cancel",
    "job-complete",
    "job-dismiss",
    "job-finalize",
    "nbd-server-start",
    "nbd-server-stop",
    "transaction",
}


async def poll(vm, value=None):
    """Return how long each iothread polls; set it to a value first."""
    if value is not None:
        for thread in await vm.execute("query-iothreads"):
            path = f"/objects/{thread['id']}"
            await vm.execute("qom-set", path=path, property="poll-max-ns", value=value)
    return {one["id"]: one["poll-max-ns"] for one in await vm.execute("query-iothreads")}


async def guards(vm):
    """Return the names of what is in the VM because of polling."""
    names = [item["name"] for item in await vm.execute("qom-list", path="/objects")]
    return [name for name in names if name.startswith("qmpblock-poll")]


async def moves(vm, disk=0, seconds=2.0):
    """Whether the guest's requests are answered."""
    first = await vm.guest.progress(disk)
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        seen = await vm.guest.progress(disk)
        if (seen.acked, seen.reads) != (first.acked, first.reads):
            return True
        await asyncio.sleep(0.005)
    return False


async def begin(vm, invariant, disks=1):
    """Have the thread poll, and the guest write one request at a time."""
    for thread in await vm.execute("query-iothreads"):
        # From its first turn on for as long as it may.
        path = f"/objects/{thread['id']}"
        await vm.execute("qom-set", path=path, property="poll-grow", value=10**6)
    await poll(vm, POLL)
    await invariant.begin(vm)
    for number in range(disks):
        await vm.guest.stress(
            StressSpec(
                disk=number,
                seed=number + 1,
                blocks=1024,
                block_size=4096,
                queue_depth=1,
                rate=100,
            )
        )
    await asyncio.sleep(0.05)


async def end(vm, disks=1):
    """End the guest's writes, and see that none is lost."""
    for number in range(disks):
        done = await vm.guest.stop_stress(number)
        assert (done.bad, done.errors) == (0, 0), done
        assert await vm.guest.check(number) > 0


async def start_polling(vm):
    """Have a thread that may poll do so, with no kick of the guest's left over from before."""
    if any((await poll(vm)).values()):
        await poll(vm, 0)
        await asyncio.sleep(0.1)
        await poll(vm, POLL)
        await until(vm, lambda queue: queue.kicks_off)


async def stop_polling(vm):
    """Have a thread that polls stop it, when it may not serve what it sees."""
    if any((await poll(vm)).values()):
        await until(vm, lambda queue: queue.kicks_off and queue.offered != queue.taken)
        await poll(vm, 0)
        await asyncio.sleep(0.05)


async def until(vm, true):
    """Wait until something is true of the disk's queue, but no longer than a second."""
    deadline = asyncio.get_running_loop().time() + 1
    while asyncio.get_running_loop().time() < deadline:
        if true((await look(vm.control, vm.pid)).queues[0]):
            return
        await asyncio.sleep(0.002)


def disturb_pivots(monkeypatch, vm):
    """Have every pivot of ours be pending for a while, in which polling ends."""
    real, complete = driving.pivot, Job.complete_now

    async def complete_now(job):
        await start_polling(vm)
        await complete(job)

    async def pivot(journal, job):
        await stop_polling(vm)
        await real(journal, job)

    monkeypatch.setattr(Job, "complete_now", complete_now)
    monkeypatch.setattr(driving, "pivot", pivot)


async def snapshot_and_commit(vm, controller, directory, number):
    disk = await controller.disk(vm.disks[0].spec.attach.id)
    overlay = directory / f"overlay{number}.qcow2"
    await controller.snapshot({disk: overlay})
    async with disk.commit():
        pass
    overlay.unlink()


async def test_no_pivot_hangs_the_guest(start_qemu, invariant, vm_dir, monkeypatch):
    vm = await start_qemu(ONE, guest=True)
    await begin(vm, invariant)
    disturb_pivots(monkeypatch, vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        for number in range(3):
            await snapshot_and_commit(vm, controller, vm_dir, number)
            assert await moves(vm), str(await look(vm.control, vm.pid))
            if vm.version >= AFFECTED:
                await poll(vm, POLL)
            await (await controller.disk("vd0")).map()
            assert await moves(vm), str(await look(vm.control, vm.pid))
    if vm.version < AFFECTED:  # else nobody has put back what this test has changed
        assert await poll(vm) == {THREAD: POLL}
    await poll(vm, POLL)
    await end(vm)


async def test_without_the_guard_it_does(start_qemu, invariant, vm_dir, monkeypatch):
    """What the test above would be without what it tests; and the harness finds out why."""

    async def nothing(*_, **__):
        pass

    monkeypatch.setattr(polling, "hold", nothing)
    monkeypatch.setattr(polling, "let_go", nothing)
    vm = await start_qemu(ONE, guest=True)
    await begin(vm, invariant)
    disturb_pivots(monkeypatch, vm)
    hung = 0
    async with qmpblock.connect(vm.monitor_path) as controller:
        for number in range(ROUNDS if vm.version < AFFECTED else 2):
            await snapshot_and_commit(vm, controller, vm_dir, number)
            if not await moves(vm):
                hung += 1
                seen = await look(vm.control, vm.pid)
                assert "(K9)" in seen.verdict(), str(seen)
                assert "wakes it" in await wake(vm.control, vm.pid)
                assert await moves(vm)
                break
            await poll(vm, POLL)
    await poll(vm, POLL)
    assert (hung > 0) == (vm.version < AFFECTED)
    await end(vm)


async def test_a_guest_that_another_tool_has_hung_is_woken(start_qemu, invariant, vm_dir):
    """Another tool's pivot, arranged to be forgotten; then `recover`, which has nothing to undo."""
    vm = await start_qemu(ONE, guest=True)
    await begin(vm, invariant)
    node = (await vm.execute("query-block"))[0]["inserted"]["node-name"]
    hung = 0
    for number in range(ROUNDS if vm.version < AFFECTED else 2):
        overlay = vm_dir / f"other{number}.qcow2"
        await asyncio.to_thread(_make_image, overlay)
        storage = {"driver": "file", "filename": str(overlay)}
        await vm.execute(
            "blockdev-add", driver="qcow2", node_name="other", backing=None, file=storage
        )
        await vm.execute("blockdev-snapshot", node=node, overlay="other")
        await vm.execute(
            "block-commit",
            job_id="theirs",
            device="other",
            base_node=node,
            auto_finalize=False,
            auto_dismiss=False,
        )
        await _status(vm, "ready")
        await start_polling(vm)
        await vm.execute("job-complete", id="theirs")
        await _status(vm, "pending")
        await stop_polling(vm)
        await vm.execute("job-finalize", id="theirs")
        await _status(vm, "concluded")
        await vm.execute("job-dismiss", id="theirs")
        await vm.execute("blockdev-del", node_name="other")
        hung += not await moves(vm)
        async with qmpblock.connect(vm.monitor_path) as controller:
            await controller.recover()
        assert await moves(vm), str(await look(vm.control, vm.pid))
        assert await poll(vm, POLL) == {THREAD: POLL}
        overlay.unlink()
        if hung:
            break
    assert (hung > 0) == (vm.version < AFFECTED)
    await end(vm)


def _make_image(path):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)


async def _status(vm, wanted):
    async with asyncio.timeout(120):
        while (await vm.execute("query-jobs"))[0]["status"] != wanted:
            await asyncio.sleep(0.002)


@pytest.mark.needs_qemu("< 10.0", reason="elsewhere polling is left alone")
async def test_every_draining_command_comes_while_no_iothread_polls(start_qemu, invariant, vm_dir):
    """One verb after another, and what they send."""
    vm = await start_qemu(parse_scenario(CHAIN.format(attach=IOTHREAD), "chain"), guest=True)
    before = await poll(vm)
    assert before == {THREAD: 32768}  # QEMU's default
    sent, polled = {}, []
    async with qmpblock.connect(vm.monitor_path) as controller:
        real = controller.monitor._execute

        async def execute(command, arguments):
            if command in DRAINS:
                sent[command] = sent.get(command, 0) + 1
                if any((await poll(vm)).values()):
                    polled.append(command)
            return await real(command, arguments)

        controller.monitor._execute = execute
        disk = await controller.disk("vd0")

        async def job(running):
            async with running:
                pass

        async def cancelled():
            async with (
                disk.stream(speed=65536) as running,
                qmpblock.connect(vm.second_monitor_path) as other,
            ):
                await steer(other, running.id, "cancel")

        async def another_speed():
            async with (
                disk.commit(base="@1", speed=65536) as running,
                qmpblock.connect(vm.second_monitor_path) as other,
            ):
                await steer(other, running.id, "speed", 0)

        verbs = {
            "map": disk.map,
            "layers": disk.layers,
            "thin": lambda: disk.allocate(0, 2 << 20),
            "snapshot": lambda: controller.snapshot({disk: vm_dir / "new.qcow2"}),
            "cancel": cancelled,
            "pivot": another_speed,
            "commit of middle layers": lambda: job(disk.commit(top="@1", base="@2")),
            "full": lambda: disk.allocate(6 << 20, 1 << 20, full=True),
            "stream": lambda: job(disk.stream()),
            "recover": controller.recover,
            "room": lambda: disk.make_room(1 << 20),
        }
        for name, verb in verbs.items():
            with contextlib.suppress(JobError):  # of the one that is cancelled
                await verb()
            assert polled == [], name
            assert await poll(vm) == before, name
            assert await guards(vm) == [], name
    assert sent.keys() >= {
        "block-commit",
        "block-export-add",
        "block-stream",
        "blockdev-reopen",
        "job-finalize",
        "transaction",
    }
    invariant.forget(vm)  # what all that does is shown elsewhere


async def test_two_disks_of_one_iothread(start_qemu, invariant, vm_dir, monkeypatch):
    """Two controllers at once, and the last one puts back what the first one found."""
    image = vm_dir / "second.qcow2"
    await asyncio.to_thread(_make_image, image)
    storage = {"driver": "file", "filename": str(image)}
    node = {"driver": "qcow2", "node-name": "second", "file": storage}
    device = {"driver": "virtio-blk-pci", "id": "vd1", "drive": "second", "iothread": THREAD}
    extra = ["-blockdev", json.dumps(node), "-device", json.dumps(device)]
    vm = await start_qemu(ONE, guest=True, extra=extra)
    await begin(vm, invariant, disks=2)
    disturb_pivots(monkeypatch, vm)

    async with qmpblock.connect(vm.monitor_path) as controller:
        for number in range(2):
            for layer in range(2):
                disk = await controller.disk(f"vd{number}")
                await controller.snapshot({disk: vm_dir / f"over{number}-{layer}.qcow2"})

    async def work(address, number):
        # No overlay is made in here: that and a query of the other one's would be K11.
        async with qmpblock.connect(address) as controller:
            disk = await controller.disk(f"vd{number}")
            while len(disk.chain.layers) > 1:
                async with disk.commit(base="@1"):
                    pass
                await disk.map()

    async with asyncio.TaskGroup() as group:
        group.create_task(work(vm.monitor_path, 0))
        group.create_task(work(vm.second_monitor_path, 1))
    assert await moves(vm, 0)
    assert await moves(vm, 1)
    if vm.version < AFFECTED:  # else nobody has put back what this test has changed
        assert await poll(vm) == {THREAD: POLL}
    await poll(vm, POLL)
    assert await guards(vm) == []
    await end(vm, disks=2)


@pytest.mark.needs_qemu("< 10.0", reason="elsewhere polling is left alone")
async def test_one_of_two_guards_ends(start_qemu, invariant):
    vm = await start_qemu(ONE, guest=True)
    await poll(vm, POLL)
    await invariant.begin(vm)
    async with (
        qmpblock.connect(vm.monitor_path) as one,
        qmpblock.connect(vm.second_monitor_path) as two,
    ):
        await polling.hold(one.monitor)
        await polling.hold(two.monitor)
        await polling.hold(two.monitor)
        assert await poll(vm) == {THREAD: 0}
        await polling.let_go(one.monitor)
        await polling.let_go(two.monitor)
        assert await poll(vm) == {THREAD: 0}
        await polling.let_go(two.monitor)
        assert await poll(vm) == {THREAD: POLL}
        # What a user sets meanwhile is the user's.
        async with polling.unpolled(one.monitor):
            await poll(vm, 7)
        assert await poll(vm) == {THREAD: 7}
    await poll(vm, POLL)


async def test_cancelled_as_polling_is_switched_off(start_qemu, invariant):
    """Ctrl-C at any moment of it: whoever is cancelled there never comes to let go."""
    vm = await start_qemu(ONE, guest=True)
    await poll(vm, POLL)
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        execute, sent = controller.monitor.execute, 0

        async def cancelling(*words, **more):
            nonlocal sent
            sent += 1
            if sent == at:
                task.cancel()
            return await execute(*words, **more)

        controller.monitor.execute = cancelling
        for at in range(1, 20):
            sent = 0
            task = asyncio.ensure_future(polling.hold(controller.monitor))
            await asyncio.wait({task})
            if not task.cancelled():
                break
            assert await guards(vm) == [], f"cancelled at command {at}"
            assert await poll(vm) == {THREAD: POLL}
        assert (at > 6) == (vm.version < AFFECTED)
        await polling.let_go(controller.monitor)
    assert await poll(vm) == {THREAD: POLL}


@pytest.mark.needs_qemu("< 10.0", reason="elsewhere polling is left alone")
async def test_who_has_polling_switched_off_keeps_it_so(start_qemu, invariant):
    vm = await start_qemu(ONE, guest=True)
    await poll(vm, 0)
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        trace = deadly(controller.monitor, 0, "before", None)
        await (await controller.disk("vd0")).map()
        assert not any(sent == "qom-set" for sent in trace)
        await controller.recover()
    assert await poll(vm) == {THREAD: 0}
    assert await guards(vm) == []


@pytest.mark.needs_qemu("< 10.0", reason="elsewhere polling is left alone")
@pytest.mark.parametrize("heir", ["map", "recover"])
async def test_what_a_killed_controller_left_off(heir, start_qemu, invariant):
    vm = await start_qemu(ONE, guest=True)
    await begin(vm, invariant)
    await _die_with_a_guard(vm)
    assert await poll(vm) == {THREAD: 0}
    async with qmpblock.connect(vm.monitor_path) as controller:
        if heir == "map":
            await (await controller.disk("vd0")).map()
        else:
            [planned] = await controller.recover(dry_run=True)
            assert planned.what.startswith("use of qmpblock-poll-")
            assert await controller.recover() == [planned]
            assert await controller.recover() == []
    assert await poll(vm) == {THREAD: POLL}
    assert await moves(vm)
    await end(vm)


async def _die_with_a_guard(vm):
    code = (
        "import asyncio, os, signal, sys, qmpblock\n"
        "from qmpblock.qemu import polling\n"
        "async def main():\n"
        "    async with qmpblock.connect(sys.argv[1]) as vm:\n"
        "        await polling.hold(vm.monitor)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, vm.monitor_path)
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.needs_qemu("< 10.0", reason="elsewhere polling is left alone")
async def test_polling_is_left_alone_while_a_pivot_is_pending(start_qemu, invariant, vm_dir):
    """Another tool's pivot, and a map of ours in the middle of it."""
    vm = await start_qemu(ONE, guest=True)
    await begin(vm, invariant)
    node = (await vm.execute("query-block"))[0]["inserted"]["node-name"]
    overlay = vm_dir / "other.qcow2"
    await asyncio.to_thread(_make_image, overlay)
    storage = {"driver": "file", "filename": str(overlay)}
    await vm.execute("blockdev-add", driver="qcow2", node_name="other", backing=None, file=storage)
    await vm.execute("blockdev-snapshot", node=node, overlay="other")
    await vm.execute(
        "block-commit",
        job_id="theirs",
        device="other",
        base_node=node,
        auto_finalize=False,
    )
    await _status(vm, "ready")
    await vm.execute("job-complete", id="theirs")
    await _status(vm, "pending")
    async with qmpblock.connect(vm.monitor_path) as controller:
        async with polling.unpolled(controller.monitor):
            assert await poll(vm) == {THREAD: POLL}
        assert await guards(vm) == []
        await _die_with_a_guard_of(vm, {THREAD: POLL})
        await poll(vm, 0)  # as that one had left it, before the pivot
        await polling.hold(controller.monitor)
        letting = asyncio.create_task(polling.let_go(controller.monitor))
        await asyncio.sleep(0.3)
        assert await poll(vm) == {THREAD: 0}
        await vm.execute("job-finalize", id="theirs")
        await letting
    assert await poll(vm) == {THREAD: POLL}
    assert await guards(vm) == []
    await vm.execute("blockdev-del", node_name="other")
    async with qmpblock.connect(vm.monitor_path) as controller:
        await controller.recover()  # the test itself has switched polling off in a drain
    assert await moves(vm)
    await end(vm)


async def _die_with_a_guard_of(vm, values):
    """Leave what a controller that was killed leaves, whatever the threads' values are."""
    code = (
        "import json, sys\nfrom qmpblock.qemu.lock import Holder\n"
        "print(Holder.me('deadbeef', poll_max_ns=json.loads(sys.argv[1])).text())"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, json.dumps(list(values.items()))],
        capture_output=True,
        text=True,
        check=True,
    )
    await vm.execute(
        "object-add", qom_type="secret", id=guard_name("deadbeef"), data=done.stdout.strip()
    )
