"""What a review found by attacking: each of these failed once."""

import asyncio
import contextlib
import os
import signal
import sys
from contextlib import nullcontext

import pytest
from disturbed import locks

import qmpblock
from qmpblock.errors import Error, RecordError, StalledError
from qmpblock.host.processes import boot_id, pid_namespace
from qmpblock.names import NBD_LOCK
from qmpblock.qemu.lock import Holder

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")


@pytest.mark.scenarios("stress-chain.yaml")
async def test_maps_while_the_image_file_grows(scenario, start_qemu, invariant):
    """Each write allocates: the protocol node's size changes, and the chain is still the same."""
    vm = await start_qemu(scenario)
    done = False

    async def write():
        offset = 0
        while not done:
            await vm.qemu_io("d0", f"write -P 0x55 {offset % 32}M 64K")
            await vm.qemu_io("d0", f"discard {offset % 32}M 64K")
            offset += 1

    writing = asyncio.create_task(write())
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for _ in range(20):
            await disk.map()
        for _ in range(3):
            await disk.layers()
    done = True
    await writing
    invariant.forget(vm)  # the guest has changed its disk


@contextlib.contextmanager
def stopped_at(monitor, vm, command, seconds):
    """Stop QEMU when `command` is about to be sent, once, and let it go on after a while."""
    real, done = monitor._execute, []

    async def execute(name, arguments):
        if name == command and not done:
            done.append(True)
            os.kill(vm.pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(seconds, os.kill, vm.pid, signal.SIGCONT)
        return await real(name, arguments)

    monitor._execute = execute
    try:
        yield done
    finally:
        monitor._execute = real


@CHAIN
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        "object-add",
        "getfd",
        "nbd-server-start",
        "block-export-add",
        "block-export-del",
        "closefd",
        "nbd-server-stop",
        "object-del",
    ],
)
async def test_an_unknown_outcome_is_undone(command, foreign, scenario, start_qemu, vm_dir):
    """No answer within the stall limit: the command may have been carried out, or not."""
    vm = await start_qemu(scenario)
    socket = str(vm_dir / "foreign") if foreign else None
    if foreign:
        await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    async with qmpblock.connect(vm.monitor_path, nbd=socket, stall=0.6) as controller:
        [disk] = await controller.disks()
        expected = await disk.map()
        with stopped_at(controller.monitor, vm, command, 1.0) as reached:
            try:
                await disk.map()
            except StalledError as error:
                assert error.standing
            else:
                assert not reached  # no such command on this way
        await asyncio.sleep(0.6)
        assert await disk.map() == expected
    assert await vm.execute("query-block-exports") == []
    if foreign:
        await vm.execute("nbd-server-stop")


@CHAIN
@pytest.mark.parametrize("command", ["object-add", "blockdev-add", "object-del"])
async def test_a_change_that_qemu_never_answered_is_nobodys(
    command, scenario, start_qemu, invariant
):
    """A process that lives has given it up: its own next change takes away what is left."""
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # its chain gets shorter
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with silent_from(controller.monitor, vm, command):
            with pytest.raises(StalledError) as failed:
                async with disk.stream(base="@2"):
                    pass
            assert failed.value.remedy == f"run: qmpblock recover unix:{vm.monitor_path}"
        [disk] = await controller.disks()
        async with disk.stream():
            pass
    assert await locks(vm) == set()


@contextlib.contextmanager
def silent_from(monitor, vm, command):
    """Have QEMU say nothing any more, from before `command` is sent until this is left."""
    real, stall, process = monitor._execute, monitor.stall, os.pidfd_open(vm.pid)

    async def execute(name, arguments):
        if name == command:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            monitor.stall = 0.3
        return await real(name, arguments)

    monitor._execute = execute
    try:
        yield
    finally:
        signal.pidfd_send_signal(process, signal.SIGCONT)
        os.close(process)
        monitor._execute, monitor.stall = real, stall


# `qmpblock map`, held inside its export.
HELD = """
import asyncio, sys
import qmpblock.mapping
async def forever(*arguments):
    print("inside", flush=True)
    await asyncio.sleep(3600)
qmpblock.mapping._read_map = forever
from qmpblock.cli.app import run
sys.exit(run(["map", sys.argv[1], sys.argv[2], "--json"]))
"""


@CHAIN
async def test_a_second_interrupt_does_not_break_off_the_undoing(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        name = (await controller.disks())[0].name
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", HELD, vm.monitor_path, name),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    first = (await process.stdout.readline()).strip()
    assert first == b"inside", await process.stderr.read()
    os.kill(vm.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.2)
        assert process.returncode is None
    finally:
        os.kill(vm.pid, signal.SIGCONT)
    _, err = await process.communicate()
    assert process.returncode == 130, err
    assert b"still undoing" in err
    assert await vm.execute("query-block-exports") == []


@CHAIN
async def test_a_forged_lock_deletes_nothing(scenario, start_qemu, invariant, vm_dir):
    """Anybody with a monitor can write one; what it says is not to be trusted."""
    vm = await start_qemu(scenario)
    dead = Holder.me("victim1")
    victim = vm_dir / "qmpblock-victim1"
    victim.mkdir()
    (victim / "nbd").write_text("precious")
    whole = {"exports": ["d0"], "path": str(victim / "nbd"), "ports": [5], "monitor": "x"}
    for details, readable in (
        ({**whole, "custody": False}, True),
        ({**whole, "custody": True, "path": "/"}, True),
        ({"path": str(victim / "nbd"), "exports": ["d0"], "ports": 5}, False),
        ({"path": ["x"], "exports": [{}] * 3, "monitor": 7}, False),
    ):
        forged = Holder(dead.run, dead.host, 1 << 22, 1, dead.boot, dead.pids, details)
        await vm.execute("object-add", qom_type="secret", id=NBD_LOCK, data=forged.text())
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = (await controller.disks())[0]
            with nullcontext() if readable else pytest.raises(RecordError, match="cannot be read"):
                await disk.map()
        if not readable:
            await vm.execute("object-del", id=NBD_LOCK)
    assert (victim / "nbd").read_text() == "precious"


@CHAIN
@pytest.mark.parametrize("verb", ["recover", "verb"])
@pytest.mark.parametrize("name", [NBD_LOCK, "qmpblock-disk-vd0", "qmpblock-ahead-vd0"])
async def test_a_recovery_that_died_when_it_had_taken_a_lock_over(
    name, verb, scenario, start_qemu, invariant
):
    """It had undone what the dead left, and says nothing of work of its own: there is none."""
    vm = await start_qemu(scenario)
    dead = Holder("gone", "h", 1 << 22, 1, boot_id(), pid_namespace(), {})
    await vm.execute("object-add", qom_type="secret", id=name, data=dead.text())
    async with qmpblock.connect(vm.monitor_path) as controller:
        if verb == "recover":
            for dry_run in (True, False):
                [found] = await controller.recover(dry_run=dry_run)
                assert (found.run, found.steps[0].verb) == ("gone", "remove")
        elif name == NBD_LOCK:
            await (await controller.disks())[0].map()
        else:
            disk = await controller.disk("vd0")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await (disk.keep_ahead(1 << 20) if "ahead" in name else disk.allocate(0, 65536))
    assert not await locks(vm)


@CHAIN
async def test_turns_of_the_dead_are_swept(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    dead = Holder("gone", "h", 1 << 22, 1, boot_id(), pid_namespace(), {})
    alive = Holder.me("alive")
    for holder, of in ((dead, "first"), (alive, "second")):
        await vm.execute(
            "object-add", qom_type="secret", id=f"{NBD_LOCK}-undo-{of}", data=holder.text()
        )
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disks())[0].map()
    names = {item["name"] for item in await vm.execute("qom-list", path="/objects")}
    assert f"{NBD_LOCK}-undo-first" not in names
    assert f"{NBD_LOCK}-undo-second" in names
    await vm.execute("object-del", id=f"{NBD_LOCK}-undo-second")


@CHAIN
async def test_a_node_that_vanishes_before_its_export_is_looked_for_again(
    scenario, start_qemu, invariant
):
    vm = await start_qemu(scenario)
    overlay = str(vm.image_directories()[0] / "overlay.qcow2")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        node = disk.chain.active.node.name
        await vm.execute(
            "blockdev-snapshot-sync",
            node_name=node,
            snapshot_file=overlay,
            snapshot_node_name="foreign",
        )
        real, done = controller.monitor._execute, []

        async def execute(name, arguments):
            if name == "block-export-add" and not done:
                done.append(True)
                await vm.execute("block-commit", job_id="c", device="foreign", base_node=node)
                while (await vm.execute("query-block-jobs"))[0]["ready"] is not True:
                    await asyncio.sleep(0.01)
                await vm.execute("block-job-complete", device="c")
                while await vm.execute("query-block-jobs"):
                    await asyncio.sleep(0.01)
                with contextlib.suppress(Error):  # gone by itself where it had no name
                    await vm.execute("blockdev-del", node_name="foreign")
            return await real(name, arguments)

        controller.monitor._execute = execute
        found = await disk.map()
        assert done
        assert found.layers == 3
        assert disk.chain.active.node.name == node
    invariant.forget(vm)  # the images are not as they were


@CHAIN
async def test_a_tcp_server_of_the_dead_is_stopped(scenario, start_qemu, invariant, free_port):
    """Killed between starting it and adding an export, its port alone tells whose it is."""
    monitor = f"127.0.0.1:{free_port}"
    await start_qemu(scenario, extra=["-qmp", f"tcp:{monitor},server=on,wait=off"])
    code = (
        "import asyncio, os, sys, qmpblock, qmpblock.export.session as e\n"
        "async def die(self, slot): os._exit(9)\n"
        "e._Session._add_export = die\n"
        "async def main():\n"
        "    async with qmpblock.connect(sys.argv[1], insecure=True) as vm:\n"
        "        await (await vm.disks())[0].map()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, monitor)
    assert await process.wait() == 9
    async with qmpblock.connect(monitor, insecure=True) as controller:
        await (await controller.disks())[0].map()
