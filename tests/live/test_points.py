"""Points in time: a disk as it was, or several at one instant, for anybody's NBD client."""

import asyncio
import json
import os
import time
from contextlib import AsyncExitStack

import pytest
from disturbed import nothing_of_ours, until
from fleecing import MIB, SPEC, begin_writing, ran, read_out, read_plainly
from pointing import DISKS, SAFE, SHOWN, STEPS, TWO, at_ease, taken, written

import qmpblock
from qmpblock.errors import RequestError, UnsupportedError
from qmpblock.testing.images import Tools
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import Taken, check_one_instant, check_point_in_time

pytestmark = pytest.mark.live


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


@pytest.mark.parametrize("name", ["raw", "uneven", "chain"])
async def test_what_the_guest_changes_is_seen_as_it_was(name, start_qemu, vm_dir, invariant):
    """However it does, and whoever reads: in pieces by block status, or across all of it (K37)."""
    uneven = DISKS["raw"].replace("18M", "18875904")  # 1.5 KiB more
    text = uneven if name == "uneven" else DISKS[name]
    vm = await start_qemu(parse_scenario(text, "disk"), guest=True)
    for layer in vm.disks[0].active.chain():
        with layer.path.open("rb") as image:
            os.fsync(image.fileno())  # else ext4 may call data what has just been zeroed
    was = bytes(16 * MIB) + bytes([SHOWN]) * MIB
    part = MIB // 4
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        was += bytes(disk.size - len(was))
        async with disk.point_in_time() as point:
            await vm.guest.discard(0, 16 * MIB, part)
            await vm.guest.write_zeroes(0, 16 * MIB + part, part)
            await vm.guest.fill(0, 16 * MIB + 2 * part, part, 0x22)
            await vm.guest.fill(0, MIB, 512, 0x11)
            for program in ("qemu-img", "nbdcopy"):
                await read_out(vm_dir / program, point.uri, program)
                assert (vm_dir / program).read_bytes() == was
            assert await read_plainly(point.socket, point.export, 0, disk.size) == was
            whole = 16 * MIB + part // 2 + 512  # begins and ends within what is kept at once
            data = await read_plainly(point.socket, point.export, whole, MIB)
            assert data == was[whole : whole + MIB]
            code, said = await ran("nbdinfo", "--map", "--json", point.uri)
            assert code == 0
            zeros = [one for one in json.loads(said) if one["type"] & 2]
            assert not any(any(was[one["offset"] : one["offset"] + one["length"]]) for one in zeros)
        async with disk.point_in_time() as point:
            await read_out(vm_dir / "later", point.uri)
        data = (vm_dir / "later").read_bytes()
        assert not any(data[16 * MIB + part : 16 * MIB + 2 * part])
        assert data[16 * MIB + 2 * part : 16 * MIB + 3 * part] == bytes([0x22]) * part
        assert data[MIB : MIB + 512] == bytes([0x11]) * 512
    await nothing_of_ours(vm)


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
        for how in ({"at": "start"}, {"at": "end"}, {"pivot": True}):
            with pytest.raises(UnsupportedError, match="share-rw=on"):
                async with disk.copy(vm_dir / "copy", **how):
                    raise AssertionError
    assert not list(vm_dir.glob("copy*"))
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
                ends = ("Invalid argument", "endpoint is not connected")  # before 10.0 (K37)
                assert code == 0 or any(one in said for one in ends)
                return code

            await until(ended, "an error for the reader")
            await written(vm, 1000)
            assert kept.stat().st_blocks * 512 <= 5 * MIB
            assert (await vm.execute("query-status"))["status"] == "running"
        assert list(elsewhere.iterdir()) == []
    await at_ease(vm)


async def test_what_is_read_is_not_charged_to_the_guests_limits(start_qemu, invariant):
    vm = await start_qemu(parse_scenario(DISKS["throttle"], "disk"), guest=True)
    invariant.forget(vm)  # its limits are others now
    limits = {"path": "/objects/group-d0", "property": "limits"}
    await vm.execute("qom-set", **limits, value={"bps-total": MIB // 8})
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.point_in_time() as point:
            began = time.monotonic()
            assert await ran("nbdcopy", "--no-extents", point.uri, "null:") == (0, "")
            assert time.monotonic() - began < 72  # 18 MiB would take 144 s
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


BELOW = """
about: Data in each of two layers, and none beyond.
images:
  - {size: 4M, content: [write 0 1M 0xaa]}
  - {content: [write 1M 1M 0xbb]}
"""


async def test_what_lies_below_is_told_as_data(start_qemu, qemu_binary):
    """Who skips what is told as a hole leaves out nothing (K28)."""
    vm = await start_qemu(parse_scenario(BELOW, "below"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.point_in_time() as point:
            told = await ran(
                Tools.of(qemu_binary).img, "map", "--output=json", "-f", "raw", point.uri
            )
    assert told[0] == 0, told
    data = [one for one in json.loads(told[1]) if one["data"]]
    assert (data[0]["start"], data[0]["zero"]) == (0, False)
    assert sum(one["length"] for one in data) >= 2 * MIB
    assert all(one["zero"] for one in json.loads(told[1]) if not one["data"])
