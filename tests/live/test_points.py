"""Points in time: a disk as it was, or several at one instant, for anybody's NBD client."""

import asyncio
import json
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from disturbed import nothing_of_ours, until
from fleecing import MIB, SPEC, begin_writing, ran, read_out

import qmpblock
from qmpblock.errors import BusyError, CommandError, RequestError, UnsupportedError
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, Taken, check_one_instant, check_point_in_time

pytestmark = pytest.mark.live

SHOWN = 0xAA
CHAIN = """\
about: An overlay, over a base that holds what lies behind the area that the guest writes to.
images:
  - {format: raw, size: 18M, content: [write 16M 1M 0xaa]}
  - {size: 18M}
"""
ONE = """\
about: One disk.
images: [{format: FORMAT, size: 18M, content: [write 16M 1M 0xaa]}]
"""
IOTHREAD = "attach: {iothread: one}\n"
DISKS = {
    "raw": ONE.replace("FORMAT", "raw"),
    "chain": CHAIN,
    "throttle": CHAIN + "attach: {filters: [throttle]}\n",
    "copy-on-read": CHAIN + "attach: {filters: [copy-on-read]}\n",
    "throttle-over-copy-on-read": CHAIN + "attach: {filters: [throttle, copy-on-read]}\n",
    "virtio-scsi": CHAIN + "attach: {device: virtio-scsi}\n",
    "drive": CHAIN + "attach: {style: drive}\n",
    "drive-if": CHAIN + "attach: {style: drive-if}\n",
    "iothread": CHAIN + IOTHREAD,
    "throttle-iothread": CHAIN + "attach: {iothread: one, filters: [throttle]}\n",
    "luks": ONE.replace("FORMAT", "luks").replace("size:", "secret: sesame, size:"),
}
SAFE = pytest.mark.needs_qemu(">= 10.0", reason="K1")
TWO = """\
about: Two disks of different kinds.
disks:
  - {images: [{format: raw, size: 4M}]}
  - {images: [{size: 16M}], attach: {device: virtio-scsi}}
"""
STEPS = (
    StressSpec(disk=0, blocks=1024, block_size=4096, seed=1),
    StressSpec(disk=1, blocks=1024, block_size=16384, seed=2),
)


@asynccontextmanager
async def taken(vm, disk, disks=(0,), **options):
    """Enter a point in time of a disk; yields it, and between which writes it lies."""
    async with AsyncExitStack() as stack:
        async with vm.guest.bounds(*disks) as bounds:
            point = await stack.enter_async_context(disk.point_in_time(**options))
        yield point, bounds[0]


async def at_ease(vm, *specs):
    for spec in specs or (SPEC,):
        done = await vm.guest.stop_stress(spec.disk)
        assert (done.bad, done.errors) == (0, 0), done
        assert await vm.guest.check(spec.disk) > 0
    await nothing_of_ours(vm)


async def written(vm, count, disk=0):
    """Wait until the guest has written so many blocks more."""
    before = (await vm.guest.progress(disk)).acked

    async def enough():
        return (await vm.guest.progress(disk)).acked >= before + count

    await until(enough, f"{count} writes")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[SAFE] if "iothread" in one else []) for one in DISKS],
)
async def test_every_disk_as_it_was(name, start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS[name], "disk"), guest=True)
    await begin_writing(vm)
    copy = vm_dir / "copy.raw"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for program in ("qemu-img", "nbdcopy"):
            async with taken(vm, disk) as (point, bounds):
                assert point.size == disk.size
                await written(vm, 2000)
                await read_out(copy, point.uri, program)
                await read_out(copy, point.uri, program)  # it is still the same
            data = copy.read_bytes()
            found = check_point_in_time(data[: 16 * MIB], SPEC, bounds)
            assert found.ok, found
            assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
            copy.unlink()
    await at_ease(vm)


async def test_two_disks_at_one_instant(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    specs = await vm.guest.stress_in_step(*STEPS)
    await written(vm, 500)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        for _ in range(3):
            async with AsyncExitStack() as stack:
                async with vm.guest.bounds(0, 1) as bounds:
                    points = await stack.enter_async_context(controller.point_in_time(disks))
                await written(vm, 500)
                copies = [vm_dir / f"copy{n}.raw" for n in range(2)]
                await asyncio.gather(
                    *(
                        read_out(copy, points[disk].uri)
                        for copy, disk in zip(copies, disks, strict=True)
                    )
                )
            assert (await vm.execute("query-status"))["status"] == "running"
            result = check_one_instant(
                {
                    disk.name: Taken(copy.read_bytes()[: spec.length], spec, bounds[spec.disk])
                    for disk, spec, copy in zip(disks, specs, copies, strict=True)
                }
            )
            assert result.ok, str(result)
    await at_ease(vm, *specs)


async def test_two_disks_one_after_the_other_are_not(start_qemu, vm_dir, invariant):
    """So that the one above can fail."""
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    specs = await vm.guest.stress_in_step(*STEPS)
    await written(vm, 500)
    copies = {}
    async with qmpblock.connect(vm.monitor_path) as controller, vm.guest.bounds(0, 1) as bounds:
        for disk, spec in zip(await controller.disks(), specs, strict=True):
            async with disk.point_in_time() as point:
                await read_out(vm_dir / disk.name, point.uri)
                await written(vm, 200)
            copies[disk.name] = ((vm_dir / disk.name).read_bytes()[: spec.length], spec)
    found = {name: Taken(data, spec, bounds[spec.disk]) for name, (data, spec) in copies.items()}
    assert not check_one_instant(found).ok
    await at_ease(vm, *specs)


async def test_what_the_guest_discards_and_zeroes_is_seen_as_it_was(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"), guest=True)
    copy = vm_dir / "copy.raw"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.point_in_time() as point:
            await vm.guest.discard(0, 16 * MIB, MIB // 2)
            await vm.guest.write_zeroes(0, 16 * MIB + MIB // 2, MIB // 2)
            await vm.guest.fill(0, MIB, 512, 0x11)
            await read_out(copy, point.uri)
        data = copy.read_bytes()
        assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
        assert not any(data[: 16 * MIB])
        async with disk.point_in_time() as point:
            await read_out(copy, point.uri)
        data = copy.read_bytes()
        assert not any(data[16 * MIB + MIB // 2 : 17 * MIB])
        assert data[MIB : MIB + 512] == bytes([0x11]) * 512


async def test_a_disk_that_others_may_write_to_is_refused(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"))
    invariant.forget(vm)  # a disk more
    path = vm_dir / "shared.raw"
    path.write_bytes(bytes(MIB))
    file = {"driver": "file", "filename": str(path)}
    await vm.execute("blockdev-add", driver="raw", node_name="shared", file=file)
    plug = {"driver": "virtio-blk-pci", "id": "vd9", "drive": "shared", "share-rw": True}
    async with qmpblock.connect(vm.monitor_path) as controller:
        await controller.monitor.execute("device_add", plug)
        disk = await controller.disk("vd9")
        with pytest.raises(UnsupportedError, match="share-rw=on"):
            async with disk.point_in_time():
                raise AssertionError
    await nothing_of_ours(vm)


@pytest.mark.parametrize("disks", [1, 2])
async def test_a_paused_vm_stays_paused(disks, start_qemu, invariant):
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    await vm.execute("stop")
    async with qmpblock.connect(vm.monitor_path) as controller:
        chosen = (await controller.disks())[:disks]
        async with controller.point_in_time(chosen) as points:
            for point in points.values():
                assert (await ran("nbdcopy", point.uri, "null:")) == (0, "")
            assert (await vm.execute("query-status"))["status"] == "paused"
    assert (await vm.execute("query-status"))["status"] == "paused"
    await vm.execute("cont")


@pytest.mark.needs_qemu("< 10.0", reason="others are safe")
async def test_a_disk_in_an_iothread_is_refused_where_a_reader_would_end_qemu(
    start_qemu, invariant
):
    vm = await start_qemu(parse_scenario(DISKS["iothread"], "disk"), guest=True)
    await begin_writing(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(UnsupportedError, match="runs in an iothread") as caught:
            async with disk.point_in_time():
                raise AssertionError
    assert caught.value.standing == "nothing was touched"
    assert "10.0" in caught.value.remedy
    await at_ease(vm)


async def test_where_there_is_no_room_the_point_ends_and_not_the_guest(
    start_qemu, vm_dir, invariant
):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)
    elsewhere = vm_dir / "elsewhere"
    elsewhere.mkdir()
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(RequestError, match="too little"):
            async with disk.point_in_time(fleece=elsewhere, fleece_limit=MIB):
                raise AssertionError
        async with taken(vm, disk, fleece=elsewhere, fleece_limit=5 * MIB) as (point, _):
            [kept] = elsewhere.iterdir()
            assert kept.stat().st_mode & 0o007 == 0

            async def ended():
                code, said = await ran("nbdcopy", point.uri, "null:")
                assert code == 0 or "Invalid argument" in said
                return code

            await until(ended, "an error for the reader")
            await written(vm, 1000)
            assert kept.stat().st_blocks * 512 <= 5 * MIB
            assert (await vm.execute("query-status"))["status"] == "running"
        assert list(elsewhere.iterdir()) == []
    await at_ease(vm)


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
        assert took < (15 if hangs else 5)
        assert await disk.map()
    await at_ease(vm)


async def test_what_is_read_is_not_charged_to_the_guests_limits(start_qemu, invariant):
    vm = await start_qemu(parse_scenario(DISKS["throttle"], "disk"), guest=True)
    invariant.forget(vm)  # its limits are others now
    limits = {"path": "/objects/group-d0", "property": "limits"}
    await vm.execute("qom-set", **limits, value={"bps-total": MIB})
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.point_in_time() as point:
            began = time.monotonic()
            assert await ran("nbdcopy", "--no-extents", point.uri, "null:") == (0, "")
            assert time.monotonic() - began < 9  # 18 MiB would take 18 s
        assert [one.driver for one in (await controller.disks())[0].chain.filters] == ["throttle"]


async def test_what_is_kept_of_an_encrypted_disk_is_encrypted(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(DISKS["luks"], "disk"), guest=True)
    plain = bytes([SHOWN]) * 4096
    for where, expected in (("kept", False), ("control", True)):
        text = DISKS["luks"] if where == "kept" else DISKS["chain"]
        vm = vm if where == "kept" else await start_qemu(parse_scenario(text, "c"), guest=True)
        (vm_dir / where).mkdir()
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            async with disk.point_in_time(fleece=vm_dir / where):
                await vm.guest.fill(0, 16 * MIB, MIB, 0x11)
                [kept] = (vm_dir / where).iterdir()
                if expected:  # a cluster at least of what was there is in it, as it was
                    await until(lambda kept=kept: plain in kept.read_bytes(), "what was there")
                else:
                    assert kept.stat().st_blocks * 512 > MIB
                    assert plain not in kept.read_bytes()


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
                assert "Operation not supported" in said
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


async def test_the_one_instant_is_short(start_qemu, invariant):
    """Of two disks, measured by QEMU's own events."""
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    await begin_writing(vm, *STEPS)
    lasted = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        with controller.monitor.subscribe("STOP", "RESUME") as events:
            for _ in range(5):
                async with controller.point_in_time(disks):
                    pass
                seen = [await events.get(10) for _ in range(2)]
                assert [one["event"] for one in seen] == ["STOP", "RESUME"]
                stamps = [json.loads(json.dumps(one["timestamp"])) for one in seen]
                at = [one["seconds"] + one["microseconds"] / 1e6 for one in stamps]
                lasted.append(at[1] - at[0])
    print(f"paused for {[f'{1000 * one:.1f} ms' for one in lasted]} on QEMU {vm.version}")
    assert min(lasted) < 0.5
    await at_ease(vm, *STEPS)


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
            async with asyncio.timeout(20):
                await reader.wait()  # its export is gone
        finally:
            for process in (holder, reader):
                if process is not None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
    await at_ease(vm, *STEPS)
