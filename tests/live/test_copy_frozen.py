"""Copies of frozen layers, as QEMU before 10.0 needs: what an overlay takes, what is refused."""

import asyncio
import json
import logging

import pytest
from disturbed import nothing_of_ours
from fleecing import ran

import qmpblock
from qmpblock.copying.copy import copy
from qmpblock.errors import Error, UnsupportedError
from qmpblock.testing.faults import fill_up, small_file_system
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

pytestmark = [
    pytest.mark.live,
    pytest.mark.needs_qemu("< 10.0", reason="from there on a copy of the start reads a view"),
]

MIB = 1 << 20
DISK = "about: A disk.\nimages: [{size: 64M, content: [write 0 16M 0xaa]}]"
SPEC = StressSpec(offset=32 * MIB, blocks=4096, block_size=4096, queue_depth=8, seed=3, rate=1500)


async def test_the_copy_is_given_up_before_the_guest_has_no_room(start_qemu, vm_dir, qemu_binary):
    """Its writes are home, and it never had an error."""
    async with small_file_system(vm_dir / "small", 92 * MIB) as small:
        built = await build(parse_scenario(DISK, "room"), small / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built, guest=True)
        target = vm_dir / "copy.qcow2"
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()

            async def copied():
                async with copy(controller, {disk: target}, speed=MIB):
                    await vm.guest.stress(SPEC)
                    async with qmpblock.connect(vm.second_monitor_path) as other:
                        [its] = await other.disks()
                        assert len(its.chain.layers) == 2

            with pytest.raises(Error, match="bytes free, and the guest's writes need") as caught:
                await copied()
        assert "with every write" in caught.value.standing
        assert not list(vm_dir.glob("copy*"))
        done = await vm.guest.stop_stress()
        assert done.errors == 0
        await nothing_of_ours(vm)
        assert [path.name for path in (small / "images").iterdir()] == ["d0-0.qcow2"]
        await vm.quit()


async def test_it_is_said_that_coming_home_waits_for_room(start_qemu, vm_dir, qemu_binary, caplog):
    """Somebody else has filled the file system up at once: nothing can be given up that helps."""
    async with small_file_system(vm_dir / "small", 92 * MIB) as small:
        built = await build(parse_scenario(DISK, "room"), small / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built)

        async def copied():
            async with qmpblock.connect(vm.monitor_path) as controller:
                [disk] = await controller.disks()
                async with copy(controller, {disk: vm_dir / "copy.qcow2"}, speed=MIB):
                    await vm.qemu_io("d0", "write -P 0xcc 32M 2M")
                    filler.append(fill_up(small))

        filler = []
        with caplog.at_level(logging.WARNING):
            work = asyncio.create_task(copied())
            async with asyncio.timeout(60):
                while not any("cannot come home to" in one.message for one in caplog.records):
                    assert not work.done()
                    await asyncio.sleep(0.1)
        filler[0].unlink()
        with pytest.raises(Error, match="bytes free, and the guest's writes need"):
            await work
        assert len([one for one in caplog.records if "cannot come home" in one.message]) == 1
        await nothing_of_ours(vm)
        await vm.quit()
        code, out = await ran(
            *("qemu-io", "-f", "qcow2", "-c", "read -P 0xcc 32M 2M", built.disks[0].active.path)
        )
        assert (code, "failed" in out) == (0, False), out


async def test_another_medium_meanwhile(start_qemu, vm_dir, invariant):
    """What the guest wrote to the one that it had comes home to that, as of an unplugged disk."""
    blockdevs = []
    for number in (0, 1):
        file = vm_dir / f"m{number}.qcow2"
        for command in (
            ("qemu-img", "create", "-q", "-f", "qcow2", file, "16M"),
            ("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} 0 8M", file),
        ):
            code, out = await ran(*command)
            assert code == 0, out
        its = {"driver": "file", "filename": str(file)}
        blockdevs += [
            "-blockdev",
            json.dumps({"driver": "qcow2", "node-name": f"m{number}", "file": its}),
        ]
    usb = ["-device", "usb-ehci", "-device", "usb-storage,drive=m0,id=stick,removable=on"]
    vm = await start_qemu((), extra=[*blockdevs, *usb])
    invariant.forget(vm)
    [stick] = [one["qdev"] for one in await vm.execute("query-block") if one.get("qdev")]
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with copy(controller, {disk: vm_dir / "copy.qcow2"}, speed=MIB) as job:
            await vm.hmp(f'qemu-io -d {stick} "write -P 9 9M 64k"')
            await vm.execute("blockdev-open-tray", id=stick, force=True)
            await vm.execute("blockdev-remove-medium", id=stick)
            await vm.execute("blockdev-insert-medium", id=stick, node_name="m1")
            await vm.execute("blockdev-close-tray", id=stick)
            await job.set_speed(0)
    await nothing_of_ours(vm)
    assert {path.name for path in vm_dir.glob("*.qcow2*")} == {"copy.qcow2", "m0.qcow2", "m1.qcow2"}
    await vm.quit()
    for file, byte in ((vm_dir / "copy.qcow2", 0), (vm_dir / "m0.qcow2", 9)):
        code, out = await ran("qemu-io", "-f", "qcow2", "-c", f"read -P {byte} 9M 64k", file)
        assert (code, "failed" in out) == (0, False), out


async def test_without_room_nothing_begins(start_qemu, vm_dir, qemu_binary):
    async with small_file_system(vm_dir / "small", 64 * MIB) as small:
        built = await build(parse_scenario(DISK, "room"), small / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built)
        fill_up(small)
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            with pytest.raises(Error, match="bytes free") as caught:
                async with copy(controller, {disk: vm_dir / "copy.qcow2"}):
                    pass
        assert caught.value.standing == "nothing was touched"
        assert not list(vm_dir.glob("copy*"))
        await vm.quit()


async def test_a_disk_for_reading_only_is_refused(start_qemu, vm_dir, qemu_binary):
    built = await build(parse_scenario(DISK, "cd"), vm_dir / "images", Tools.of(qemu_binary))
    text = f"file={built.disks[0].active.path},format=qcow2,if=none,id=d0,media=cdrom"
    vm = await start_qemu([], extra=("-drive", text, "-device", "ide-cd,drive=d0,id=vd0"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(UnsupportedError, match="for reading only") as caught:
            async with copy(controller, {disk: vm_dir / "copy.qcow2"}):
                pass
    assert "--at end" in caught.value.remedy
    assert caught.value.standing == "nothing was touched"
    assert not list(vm_dir.glob("copy*"))
