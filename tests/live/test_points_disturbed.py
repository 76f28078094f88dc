"""Points in time that somebody disturbs: readers, other controllers, whoever ends them."""

import asyncio
import signal
import socket
import sys
import time
from contextlib import suppress

import pytest
from allocating import at_command
from disturbed import nothing_of_ours, until
from fleecing import MIB, SPEC, begin_writing, ran, read_out
from pointing import DISKS, SHOWN, STEPS, TWO, at_ease, taken, written
from rounds import rounds

import qmpblock
from qmpblock.errors import BusyError, CommandError, RequestError
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import check_point_in_time

pytestmark = pytest.mark.live


async def test_no_reader_hinders_the_end(start_qemu, invariant):
    """One that is stopped in the middle, one that never says anything, one that reads on."""
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)
    hangs = Capabilities(vm.version).nbd_server_stop_hangs_in_handshake
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        stopped, reader = None, None
        with socket.socket(socket.AF_UNIX) as silent:
            try:
                async with disk.point_in_time() as point:
                    silent.connect(point.socket)
                    assert await asyncio.to_thread(silent.recv, 8) == b"NBDMAGIC"
                    slow = f"while nbdcopy '{point.uri}' null:; do :; done"
                    reader = await asyncio.create_subprocess_exec(
                        *("sh", "-c", slow), stderr=asyncio.subprocess.DEVNULL
                    )
                    stopped = await asyncio.create_subprocess_exec(
                        *("nbdcopy", "--requests=1", point.uri, "-"),
                        stdout=asyncio.subprocess.PIPE,  # nobody reads it
                        stderr=asyncio.subprocess.DEVNULL,
                    )
                    await written(vm, 2000)
                    stopped.send_signal(signal.SIGSTOP)
                    began = time.monotonic()
                took = time.monotonic() - began
            finally:
                for process in (stopped, reader):
                    if process is not None:
                        with suppress(ProcessLookupError):
                            process.kill()
                        if process.stdout is not None:
                            await process.stdout.read()
                        await process.wait()
        # QEMU gives a handshake ten seconds, and cannot be told to stop before on 7.2 (K14).
        assert took < (60 if hangs else 9)
        assert await disk.map()
    await at_ease(vm)


async def test_nobody_of_ours_changes_it_meanwhile(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        qmpblock.connect(vm.second_monitor_path, stall=0.3) as other,
    ):
        disk, theirs = [await one.disk("vd0") for one in (controller, other)]
        with pytest.raises(RequestError, match="each once"):
            async with controller.point_in_time([disk, disk]):
                raise AssertionError
        with pytest.raises(RequestError):
            async with controller.point_in_time([]):
                raise AssertionError
        async with disk.point_in_time() as point:
            with pytest.raises(BusyError, match="qmpblock-disk-vd0"):
                await theirs.snapshot(vm_dir / "new.qcow2")
            with pytest.raises(BusyError):
                async with theirs.point_in_time():
                    raise AssertionError
            with pytest.raises(BusyError, match="qmpblock-nbd"):
                await theirs.map()
            with pytest.raises(CommandError, match="does not support live migration"):
                await vm.execute("migrate", uri="exec:cat >/dev/null")
            assert await ran("nbdcopy", point.uri, "null:") == (0, "")
        assert (await theirs.map()).length == 18 * MIB


async def test_a_job_on_the_disk_is_waited_for_by_whoever_asks(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    invariant.forget(vm)  # the base leaves the chain
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.stream(speed=64 << 10):
            await until(lambda: vm.execute("query-jobs"), "the job")
            async with qmpblock.connect(vm.second_monitor_path) as other:
                with pytest.raises(BusyError):
                    async with (await other.disk("vd0")).point_in_time():
                        raise AssertionError
            [job] = await vm.execute("query-jobs")
            await vm.execute("block-job-set-speed", device=job["id"], speed=0)


@pytest.mark.parametrize("node", ["below", "above"])
async def test_somebody_takes_a_snapshot_meanwhile(node, start_qemu, vm_dir, invariant):
    """On either side of the filter, and the guest's disk is what they made of it at the end.

    Above it QEMU has the view lie on the overlay, too, so that the point has ended.
    """
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"), guest=True)
    invariant.forget(vm)  # their overlay stays
    await begin_writing(vm)
    overlay, copy = vm_dir / "new.qcow2", vm_dir / "copy.raw"
    assert (await ran("qemu-img", "create", "-q", "-f", "qcow2", overlay, "18M"))[0] == 0
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with taken(vm, disk) as (point, bounds):
            storage = {"driver": "file", "filename": str(overlay)}
            await vm.execute(
                "blockdev-add", driver="qcow2", node_name="new", backing=None, file=storage
            )
            await disk.refresh()
            over = "d0" if node == "below" else disk.chain.root.name
            await vm.execute("blockdev-snapshot", node=over, overlay="new")
            await written(vm, 1000)
            if node == "above":
                code, said = await ran("nbdcopy", point.uri, copy)
                assert code != 0
                ends = ("Operation not supported", "endpoint is not connected")  # K37
                assert any(one in said for one in ends)
            else:
                await read_out(copy, point.uri)
                found = check_point_in_time(copy.read_bytes()[: 16 * MIB], SPEC, bounds)
                assert found.ok, found
        await disk.refresh()
        assert [layer.node.name for layer in disk.chain.layers] == ["new", "d0"]
        assert disk.chain.filters == ()
    await at_ease(vm)


async def test_a_disk_that_is_unplugged_can_be_read_to_the_end(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    copy = vm_dir / "copy.raw"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.point_in_time() as point:
            await vm.execute("device_del", id="vd0")
            assert await vm.guest.eject() == 1

            async def gone():
                return not [one for one in await vm.execute("query-block") if one.get("qdev")]

            await until(gone, "the end of the device")
            await read_out(copy, point.uri)
        assert copy.read_bytes()[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
    invariant.forget(vm)
    await nothing_of_ours(vm)


async def test_a_device_that_lets_go_of_its_node_late(start_qemu, invariant):
    """One that was unplugged is gone before that; so what is ours is tried to remove again."""
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        real, refused = controller.monitor._execute, []

        async def execute(name, arguments):
            node = (arguments or {}).get("node-name", "")
            if name == "blockdev-del" and "filter" in node and len(refused) < 3:
                refused.append(node)
                raise CommandError(name, arguments, "GenericError", f"Node {node} is in use")
            return await real(name, arguments)

        controller.monitor._execute = execute
        async with disk.point_in_time():
            pass
        assert len(refused) == 3
    await nothing_of_ours(vm)


async def test_somebody_who_uses_the_view_too_keeps_it(start_qemu, invariant):
    """What is theirs is not touched; who ends it can have the rest undone."""
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)

    async def use_it(disk):
        async with disk.point_in_time():
            [ours] = await vm.execute("query-block-exports")
            await vm.execute(
                "blockdev-add", driver="raw", node_name="theirs", file=ours["node-name"]
            )

    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(BusyError, match="is used by node theirs") as caught:
            await use_it(disk)
        assert caught.value.remedy == f"run: qmpblock recover unix:{vm.monitor_path}"
        await written(vm, 500)
        await vm.execute("blockdev-del", node_name="theirs")
        [found, *_] = await controller.recover()
        assert "point-in-time of vd0" in found.what
    await at_ease(vm)


HOLDING = """
import asyncio, sys
import qmpblock
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        async with vm.point_in_time(await vm.disks()) as points:
            print(*(point.uri for point in points.values()), flush=True)
            await asyncio.sleep(3600)
asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["recover", "again"])
@pytest.mark.parametrize("monitor", ["same", "other"])
async def test_a_controller_killed_under_its_readers(way, monitor, start_qemu, vm_dir, invariant):
    """Whoever recovers, by whichever monitor, ends them, also one that never says anything."""
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    await begin_writing(vm, *STEPS)
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDING, vm.monitor_path), stdout=asyncio.subprocess.PIPE
    )
    reader = None
    with socket.socket(socket.AF_UNIX) as silent:
        try:
            async with asyncio.timeout(60):
                first, _ = (await holder.stdout.readline()).decode().split()
            silent.connect(first.partition("socket=")[2])
            reader = await asyncio.create_subprocess_exec(
                *("sh", "-c", f"while nbdcopy '{first}' null:; do :; done"),
                stderr=asyncio.subprocess.DEVNULL,
            )
            await written(vm, 500)
            holder.kill()
            await holder.wait()
            await written(vm, 500)
            address = vm.monitor_path if monitor == "same" else vm.second_monitor_path
            async with qmpblock.connect(address) as controller:
                if way == "recover":
                    done = await controller.recover()
                    assert "point-in-time of vd0, vd1" in done[0].what
                    assert await controller.recover() == []
                else:
                    async with controller.point_in_time(await controller.disks()) as points:
                        for disk, point in points.items():
                            await read_out(vm_dir / disk.name, point.uri)
            async with asyncio.timeout(120):
                await reader.wait()  # its export is gone
        finally:
            for process in (holder, reader):
                if process is not None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
    await at_ease(vm, *STEPS)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_cancelled_at_any_command(moment, start_qemu, invariant):
    """Of entering and leaving; all is as it was at once, and the guest goes on."""
    _, chance = rounds(1)
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    await begin_writing(vm, *STEPS)

    async def come_and_go(controller):
        async with controller.point_in_time(await controller.disks()):
            pass

    async with qmpblock.connect(vm.monitor_path) as controller:
        with at_command(controller.monitor, 0, lambda: None) as trace:
            await come_and_go(controller)
        before = [one for one in trace if one in ("object-add", "blockdev-add", "qom-set")]
        assert len(before) > 10
        for number in sorted(chance.sample(range(1, len(trace) + 1), 8)):
            going = asyncio.ensure_future(come_and_go(controller))
            with at_command(controller.monitor, number, going.cancel, moment):
                with suppress(asyncio.CancelledError):
                    await going
                assert (await vm.execute("query-status"))["status"] == "running"
                await nothing_of_ours(vm)
    await at_ease(vm, *STEPS)


@pytest.mark.parametrize("number", [1, 2])
async def test_where_a_disk_cannot_be_had_the_guest_goes_on(number, start_qemu, invariant):
    """In the middle of the instant, when the first disk has its filter already."""
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    await begin_writing(vm, *STEPS)
    async with qmpblock.connect(vm.monitor_path) as controller:
        real, seen = controller.monitor._execute, []

        async def execute(name, arguments):
            if name == "qom-set":
                seen.append(name)
                if len(seen) == number:
                    assert (await vm.execute("query-status"))["status"] == "paused"
                    raise CommandError(name, arguments, "GenericError", "not today")
            return await real(name, arguments)

        controller.monitor._execute = execute
        with pytest.raises(CommandError, match="not today") as caught:
            async with controller.point_in_time(await controller.disks()):
                raise AssertionError
        assert "nothing of ours is left" in caught.value.standing
        assert (await vm.execute("query-status"))["status"] == "running"
    await at_ease(vm, *STEPS)
