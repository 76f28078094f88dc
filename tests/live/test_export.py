"""Exports on a living QEMU: nothing is left behind, whatever happens in the middle."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from disturbed import until
from rounds import with_guest

import qmpblock
from qmpblock.errors import (
    BusyError,
    DisconnectedError,
    Error,
    NBDConnectError,
    NotFoundError,
    UnsupportedError,
)
from qmpblock.export import session as export
from qmpblock.export.session import Request, exports
from qmpblock.names import NBD_LOCK
from qmpblock.testing.faults import Controller
from qmpblock.testing.invariant import snapshot
from qmpblock.testing.stamps import StressSpec, checksum

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")
IOTHREAD = pytest.mark.scenarios("iothread-*.yaml")

# A controller of its own process that stops, connected, in the middle of a map.
HANGING = """
import asyncio, sys
import qmpblock, qmpblock.mapping
async def forever(*arguments):
    print("inside", flush=True)
    await asyncio.sleep(3600)
qmpblock.mapping._read_map = forever
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        await (await vm.disks())[0].map()
asyncio.run(main())
"""

# One that is stopped, connected and with its export there, before its first handshake.
STOPPING = """
import asyncio, os, signal, sys
import qmpblock, qmpblock.export
real = qmpblock.export.session._Session.connect
async def connect(session, slot):
    qmpblock.export.session._Session.connect = real
    os.kill(os.getpid(), signal.SIGSTOP)
    return await real(session, slot)
qmpblock.export.session._Session.connect = connect
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        [disk] = await vm.disks()
        print("mapped", (await disk.map()).length)
asyncio.run(main())
"""


async def hanging_controller(address):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HANGING, address, stdout=asyncio.subprocess.PIPE
    )
    assert (await process.stdout.readline()).strip() == b"inside"
    return process


async def objects(vm):
    return {item["name"] for item in await vm.execute("qom-list", path="/objects")}


@pytest.mark.scenarios("chain-3.yaml", "iothread-virtio-blk.yaml")
async def test_a_busy_host_does_not_end_a_handshake(scenario, start_qemu, invariant):
    """Stopped for ten seconds between the server's start and ours, QEMU before 10.0 hangs up."""
    vm = await start_qemu(scenario, **with_guest(scenario))
    command = [sys.executable, "-c", STOPPING, vm.monitor_path]
    async with Controller(command, vm.directory) as controller:
        status = Path(f"/proc/{controller.process.pid}/status")
        await until(lambda: "State:\tT" in status.read_text(), "the stop")
        await asyncio.sleep(10.5)
        controller.kill(signal.SIGCONT)
        assert await controller.wait() == 0, controller.stderr
    assert controller.stdout.startswith("mapped ")
    assert NBD_LOCK not in await objects(vm)


@CHAIN
@pytest.mark.needs_qemu(">= 10.0", reason="older ones take no other limit than ten seconds")
async def test_waiting_for_another_controller_outlasts_a_handshake(
    scenario, start_qemu, monkeypatch
):
    """On a foreign server the connection is there before the lock, and QEMU waits no longer."""
    vm = await start_qemu(scenario)
    path = str(vm.directory / "nbd")
    address = {"type": "unix", "data": {"path": path}}
    await vm.execute("nbd-server-start", addr=address, handshake_max_seconds=1)
    monkeypatch.setattr(export, "_HANDSHAKE", 1.0)
    async with (
        qmpblock.connect(vm.monitor_path) as holder,
        qmpblock.connect(vm.second_monitor_path, nbd=path) as controller,
    ):
        [disk] = await controller.disks()
        async with export.no_exports(holder.monitor, stall=5):
            waiting = asyncio.create_task(disk.map())
            await asyncio.sleep(1.5)
        assert (await waiting).length == disk.size
    await vm.execute("nbd-server-stop")


@IOTHREAD
async def test_a_killed_controller_does_not_kill_the_vm(scenario, start_qemu, invariant):
    """K1: without custody, QEMU before 10.0 aborts when the client of an iothread disk dies."""
    vm = await start_qemu(scenario, guest=True)
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        expected = await (await controller.disks())[0].map()
    for _ in range(3):
        process = await hanging_controller(vm.monitor_path)
        assert len(await vm.execute("query-block-exports")) == 1
        process.kill()
        await process.wait()
        assert vm.running
        await vm.execute("query-status")
        assert len(await vm.execute("query-block-exports")) == 1
    # The next controller undoes what the last one left (each one did, of the one before).
    async with qmpblock.connect(vm.monitor_path) as controller:
        assert await (await controller.disks())[0].map() == expected
    assert NBD_LOCK not in await objects(vm)


@CHAIN
async def test_the_next_controller_may_come_by_another_monitor(
    scenario, start_qemu, invariant, caplog
):
    vm = await start_qemu(scenario)
    process = await hanging_controller(vm.monitor_path)
    process.kill()
    await process.wait()
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        await (await controller.disks())[0].map()
    assert await vm.execute("query-block-exports") == []
    assert NBD_LOCK not in await objects(vm)
    # The dead one's socket is a named descriptor of the other monitor; nothing else is left, and
    # that is said.
    _, undone, left = caplog.messages
    assert f"process {process.pid}" in undone
    assert undone.endswith(" left: 1 export, the NBD server")
    assert left.endswith(f"by closefd: unix:{vm.monitor_path}")
    [name] = re.findall(r"qmpblock-\w+-0", left)
    async with qmpblock.connect(vm.monitor_path) as controller:
        await controller.monitor.execute("closefd", {"fdname": name})


@CHAIN
async def test_the_next_controller_says_what_it_undid(scenario, start_qemu, invariant, caplog):
    vm = await start_qemu(scenario)
    process = await hanging_controller(vm.monitor_path)
    process.kill()
    await process.wait()
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disks())[0].map()
    found, undone = caplog.messages
    assert "undoing" in found
    assert undone.endswith(" left: 1 export, 1 connection, the NBD server")


# One that dies when its server listens, and before there is an export on it.
DYING = """
import asyncio, os, sys
import qmpblock
from qmpblock.qemu.monitor import Monitor
real = Monitor.execute
async def execute(monitor, command, *rest, **named):
    if command == "block-export-add":
        os.kill(os.getpid(), 9)
    return await real(monitor, command, *rest, **named)
Monitor.execute = execute
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        await (await vm.disks())[0].map()
asyncio.run(main())
"""


@CHAIN
async def test_what_only_its_own_monitor_can_undo(scenario, start_qemu, invariant, caplog):
    """The error says what is left, and by which monitor to come; by that one it goes."""
    vm = await start_qemu(scenario)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING, vm.monitor_path)
    assert await process.wait() == -signal.SIGKILL
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(BusyError, match="handshake") as caught:
            await disk.map()
    assert "removed: nothing; left in it: the dead" in caught.value.standing
    assert f"came by, unix:{vm.monitor_path}: it removes the rest" in caught.value.remedy
    assert NBD_LOCK in await objects(vm)
    caplog.clear()
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disks())[0].map()
    assert caplog.messages[-1].endswith(" left: 1 connection, the NBD server")
    assert NBD_LOCK not in await objects(vm)


@CHAIN
async def test_a_live_controller_is_waited_for_and_then_named(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    process = await hanging_controller(vm.monitor_path)
    try:
        async with qmpblock.connect(vm.second_monitor_path, stall=0.5) as controller:
            with pytest.raises(BusyError, match=f"process {process.pid} on") as caught:
                await (await controller.disks())[0].map()
        assert caught.value.exit_code == 1
        assert len(await vm.execute("query-block-exports")) == 1  # the other's, untouched
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()


@CHAIN
async def test_ctrl_c_undoes(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    process = await hanging_controller(vm.monitor_path)
    process.send_signal(signal.SIGINT)
    await process.wait()
    assert await vm.execute("query-block-exports") == []
    assert NBD_LOCK not in await objects(vm)


@CHAIN
async def test_cancelling_at_any_moment_leaves_nothing(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    images = vm.image_directories()
    before = await snapshot(vm.control, vm.pid, images)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for _ in range(3):
            await disk.map()
        before = await snapshot(vm.control, vm.pid, images)
        finished = 0
        for turn in range(60):
            task = asyncio.create_task(disk.map())
            # One step of the event loop after another, so that every await is cancelled once.
            for _ in range(turn * 3):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
                finished += 1
            assert await snapshot(vm.control, vm.pid, images) - before == []
        await asyncio.sleep(0)
    assert not list((vm_dir / "t").iterdir())


@CHAIN
async def test_a_foreign_server_is_not_touched(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    socket = str(vm.directory / "foreign")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    async with qmpblock.connect(vm.monitor_path) as controller:
        found = (await controller.disks())[0]
        node = found.chain.active.node.name
        await vm.execute("block-export-add", id="theirs", type="nbd", node_name=node)
        with pytest.raises(BusyError, match="not ours") as caught:
            await found.map()
        assert "--nbd ADDRESS" in caught.value.remedy
    ids = [e["id"] for e in await vm.execute("query-block-exports")]
    assert ids == ["theirs"]
    # With its address, our own export comes and goes beside theirs.
    async with qmpblock.connect(vm.monitor_path, nbd=socket) as controller:
        seen = await (await controller.disks())[0].map()
    async with qmpblock.connect(vm.monitor_path, nbd=socket + "-wrong") as controller:
        with pytest.raises(NBDConnectError, match="no NBD server"):
            await (await controller.disks())[0].map()
    assert [e["id"] for e in await vm.execute("query-block-exports")] == ["theirs"]
    await vm.execute("nbd-server-stop")
    async with qmpblock.connect(vm.monitor_path) as controller:
        assert await (await controller.disks())[0].map() == seen


@CHAIN
async def test_a_server_stopped_by_somebody_is_not_stopped_again(scenario, start_qemu, invariant):
    """Somebody stops our server and starts their own, in the middle of our map."""
    vm = await start_qemu(scenario)
    socket = str(vm.directory / "foreign")
    async with qmpblock.connect(vm.monitor_path) as controller:
        device = (await controller.disks())[0].device
        request = Request(device.chain.active.node.name)
        with contextlib.suppress(Error):
            async with exports(controller.monitor, device, [request]) as [client]:
                await vm.execute("nbd-server-stop")
                await vm.execute(
                    "nbd-server-start", addr={"type": "unix", "data": {"path": socket}}
                )
                await client.block_status(0, 512)
    assert os.path.exists(socket)
    await vm.execute("nbd-server-stop")  # theirs still ran, or this is refused
    assert not os.path.exists(socket)


@IOTHREAD
@pytest.mark.parametrize("event", ["reset", "power off", "quit", "kill"])
async def test_the_guest_goes_away_in_the_middle(event, scenario, start_qemu, invariant):
    vm = await start_qemu(scenario, guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        device = (await controller.disks())[0].device
        request = Request(device.chain.active.node.name)
        try:
            async with exports(controller.monitor, device, [request]) as [client]:
                await client.block_status(0, 512)
                if event == "reset":
                    await vm.execute("system_reset")
                elif event == "kill":
                    await vm.kill()
                else:
                    vm.expect_exit()
                    with contextlib.suppress(Error):
                        if event == "quit":
                            await vm.execute("quit")
                        else:
                            await vm.guest.power_off()
                    code = await vm.wait(30)
                    assert code == 0, vm.evidence()
                await client.block_status(0, 512)
        except Error as error:
            assert event != "reset", error
        else:
            assert event == "reset"
    if event == "reset":
        assert vm.running
    else:
        invariant.forget(vm)


@IOTHREAD
async def test_a_paused_vm_that_goes_on_in_the_middle(scenario, start_qemu, invariant):
    """A paused VM's disk is not in its iothread; going on moves it there."""
    vm = await start_qemu(scenario, guest=True)
    await vm.guest.fill(0, 0, 65536, 0x77)
    await vm.guest.flush(0)
    expected = checksum(b"\x77" * 65536)
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        device = (await controller.disks())[0].device
        for _ in range(5):
            await vm.execute("stop")
            request = Request(device.chain.active.node.name)
            async with exports(controller.monitor, device, [request]) as [client]:
                await client.block_status(0, 512)
                await vm.execute("cont")
                await client.block_status(0, 512)
            assert await vm.guest.read(0, 0, 65536) == expected
            async with exports(controller.monitor, device, [request]) as [client]:
                await vm.execute("stop")
                await client.block_status(0, 512)
                await vm.execute("cont")
            await vm.guest.reset()
            assert await vm.guest.read(0, 0, 65536) == expected


@pytest.mark.scenarios("iothread-virtio-blk.yaml")
async def test_a_guest_that_does_not_drive_its_disk(scenario, start_qemu, invariant):
    """If it began to in the middle, QEMU before 10.0 might abort: refused, or paused."""
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        if vm.version < (10, 0, 0):
            with pytest.raises(UnsupportedError, match="does not drive it") as caught:
                await disk.map()
            assert caught.value.exit_code == 2
            assert "paused" in caught.value.remedy
            await vm.execute("stop")
        await disk.map()
        if vm.version < (10, 0, 0):
            await vm.execute("cont")


@pytest.mark.scenarios("device-virtio-scsi.yaml")
async def test_the_disk_is_unplugged_in_the_middle(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        request = Request(disk.chain.active.node.name)
        with vm.control.subscribe("DEVICE_DELETED") as deleted:
            async with exports(controller.monitor, disk.device, [request]) as [client]:
                await vm.execute("device_del", id=disk.name)
                await deleted.get(10)
                await client.block_status(0, 512)
        assert await vm.execute("query-block-exports") == []
        with pytest.raises(NotFoundError):
            await disk.map()
    invariant.forget(vm)  # the device is gone, as documented


@pytest.mark.scenarios("qcow2-data-file.yaml")
async def test_cache_on_a_data_file_disk_survives_an_unplug(scenario, start_qemu, invariant):
    """K4: without a node of ours that holds the write permission, QEMU aborts."""
    from dataclasses import replace

    built_scenario = replace(
        scenario,
        disks=tuple(
            replace(d, attach=replace(d.attach, device="virtio-scsi")) for d in scenario.disks
        ),
    )
    vm = await start_qemu(built_scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        request = Request(disk.chain.active.node.name, hold_writer=True)
        with vm.control.subscribe("DEVICE_DELETED") as deleted:
            async with exports(controller.monitor, disk.device, [request]) as [client]:
                await client.cache(0, 65536)
                await vm.execute("device_del", id=disk.name)
                await deleted.get(10)
                await client.cache(0, 65536)
                assert vm.running
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    assert not [n for n in nodes if n["node-name"].startswith("qmpblock")]
    invariant.forget(vm)  # the device is gone, as documented


@CHAIN
async def test_the_monitor_is_cut_in_the_middle(scenario, start_qemu, invariant):
    """The exports stay until the next connection, which may be this same process."""
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        device = (await controller.disks())[0].device
        request = Request(device.chain.active.node.name)
        with pytest.raises(DisconnectedError, match="before all that was added"):
            async with exports(controller.monitor, device, [request]):
                await controller.monitor.close()
    assert len(await vm.execute("query-block-exports")) == 1
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disks())[0].map()
    assert await vm.execute("query-block-exports") == []


@CHAIN
async def test_a_foreign_snapshot_in_the_middle_is_noticed(scenario, start_qemu, invariant, vm_dir):
    """An export follows the graph silently (F6); the map must be of one chain."""
    vm = await start_qemu(scenario)
    overlay = str(vm.image_directories()[0] / "overlay.qcow2")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        before = len(disk.chain.layers)
        import qmpblock.mapping as module

        real, done = module._read_map, []

        async def with_a_snapshot(*arguments):
            if not done:
                done.append(True)
                await vm.execute(
                    "blockdev-snapshot-sync",
                    node_name=disk.chain.active.node.name,
                    snapshot_file=overlay,
                    snapshot_node_name="foreign",
                )
            return await real(*arguments)

        module._read_map = with_a_snapshot
        try:
            found = await disk.map()
        finally:
            module._read_map = real
        assert found.layers == before + 1
        assert found == await disk.map()
    invariant.forget(vm)  # the overlay is there to stay


@CHAIN
async def test_many_layers_at_once(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        requests = [Request(layer.node.name) for layer in disk.chain.layers] * 5
        async with exports(controller.monitor, disk.device, requests) as clients:
            assert len(clients) == len(requests)
            await asyncio.gather(*(client.block_status(0, 512) for client in clients))


@CHAIN
async def test_an_export_that_qemu_refuses_leaves_nothing(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        device = (await controller.disks())[0].device
        with pytest.raises(Error, match="nosuch") as caught:
            async with exports(controller.monitor, device, [Request("nosuch")]):
                pass
    assert "nothing of ours is left" in caught.value.standing


@CHAIN
async def test_a_temporary_directory_that_does_not_serve(
    scenario, start_qemu, invariant, vm_dir, monkeypatch
):
    """Too long for a socket's path: another is used. Not there: said so, nothing left."""
    vm = await start_qemu(scenario)
    long = vm_dir / ("x" * 90)
    long.mkdir()
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        monkeypatch.setattr("tempfile.tempdir", str(long))
        await disk.map()
        monkeypatch.setattr("tempfile.tempdir", str(vm_dir / "gone"))
        with pytest.raises(Error, match="cannot make the directory") as caught:
            await disk.map()
    assert "TMPDIR" in caught.value.remedy


# over a TCP monitor there is no custody


async def tcp_monitor(vm):
    await vm.execute(
        "chardev-add",
        id="tcp",
        backend={
            "type": "socket",
            "data": {
                "addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}},
                "server": True,
                "wait": False,
            },
        },
    )


@IOTHREAD
async def test_a_tcp_monitor_and_an_iothread(scenario, start_qemu, invariant, free_port):
    """Refused where the QEMU is affected; elsewhere mapped."""
    extra = ["-qmp", f"tcp:127.0.0.1:{free_port},server=on,wait=off"]
    vm = await start_qemu(scenario, guest=True, extra=extra)
    async with qmpblock.connect(f"127.0.0.1:{free_port}") as controller:
        disk = (await controller.disks())[0]
        if vm.version < (10, 0, 0):
            with pytest.raises(UnsupportedError, match="iothread") as caught:
                await disk.map()
            assert caught.value.exit_code == 2
            assert "UNIX" in caught.value.remedy
        else:
            await disk.map()


@CHAIN
@pytest.mark.parametrize("insecure", [False, True])
async def test_a_tcp_monitor_without_iothread(insecure, scenario, start_qemu, invariant, free_port):
    vm = await start_qemu(scenario, extra=["-qmp", f"tcp:127.0.0.1:{free_port},server=on,wait=off"])
    async with qmpblock.connect(vm.monitor_path) as controller:
        expected = await (await controller.disks())[0].map()
    async with qmpblock.connect(f"127.0.0.1:{free_port}", insecure=insecure) as controller:
        assert await (await controller.disks())[0].map() == expected


@CHAIN
async def test_another_host_needs_tls_or_consent(scenario, start_qemu, invariant):
    from qmpblock.address import TCPAddress

    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        device = (await controller.disks())[0].device
        elsewhere = TCPAddress("vm-host.example", 4444)  # the check is by name
        controller.monitor.address = controller.monitor._transport._address = elsewhere
        with pytest.raises(UnsupportedError, match="another host") as caught:
            async with exports(controller.monitor, device, [Request("d0")]):
                pass
    assert "--insecure" in caught.value.remedy


async def openssl(*arguments, cwd):
    process = await asyncio.create_subprocess_exec(
        "openssl", *arguments, cwd=cwd, stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()


async def make_credentials(folder):
    """A CA, and certificates for 127.0.0.1, in the layout of QEMU's tls-creds-x509."""
    folder.mkdir()
    await openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=ca",
        "-keyout",
        "ca-key.pem",
        "-out",
        "ca-cert.pem",
        cwd=folder,
    )
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for who in ("server", "client"):
        await openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={who}",
            "-keyout",
            f"{who}-key.pem",
            "-out",
            f"{who}.csr",
            cwd=folder,
        )
        await openssl(
            "x509",
            "-req",
            "-in",
            f"{who}.csr",
            "-CA",
            "ca-cert.pem",
            "-CAkey",
            "ca-key.pem",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "ext",
            "-out",
            f"{who}-cert.pem",
            cwd=folder,
        )


@CHAIN
async def test_tls_over_tcp(scenario, start_qemu, invariant, free_port, vm_dir):
    await make_credentials(vm_dir / "tls")
    vm = await start_qemu(scenario, extra=["-qmp", f"tcp:127.0.0.1:{free_port},server=on,wait=off"])
    async with qmpblock.connect(vm.monitor_path) as controller:
        expected = await (await controller.disks())[0].map()
    address, creds = f"127.0.0.1:{free_port}", str(vm_dir / "tls")
    async with qmpblock.connect(address, tls_creds=creds) as controller:
        assert await (await controller.disks())[0].map() == expected


@CHAIN
async def test_a_guest_that_writes_is_not_disturbed(scenario, start_qemu, invariant):
    """Maps under stress; the guest checks each of its reads, and all at the end."""
    vm = await start_qemu(scenario, guest=True)
    spec = StressSpec(blocks=1024, block_size=4096, queue_depth=16, flush_every=64, read_percent=30)
    await vm.guest.stress(spec)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for _ in range(60):
            await disk.map()
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0)
    assert done.acked > 1000
    assert await vm.guest.check() > 0
