"""The tiny guest on a real QEMU: every machine, every command, and what the verifier finds."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import pytest
from disturbed import writes_on

from qmpblock.errors import RangeError, RequestError, StalledError
from qmpblock.testing.guest import (
    FIRMWARE,
    GuestConsole,
    GuestError,
    StressSpec,
    TinyGuest,
    guest_arguments,
)
from qmpblock.testing.stamps import (
    Bounds,
    Taken,
    check_acknowledged,
    check_one_instant,
    check_point_in_time,
    checksum,
    expected_content,
    stamped,
)

pytestmark = pytest.mark.live

QEMU = os.environ.get("QMPBLOCK_QEMU") or "qemu-system-x86_64"
_BESIDE = Path(shutil.which(QEMU) or QEMU).with_name("qemu-img")
QEMU_IMG = str(_BESIDE) if _BESIDE.exists() else "qemu-img"
MIB = 1 << 20
MACHINES = ("pc", "q35", "microvm")


class Vm:
    """One QEMU with a guest, a QMP monitor and what it said on stderr."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        guest: TinyGuest,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self.guest = guest
        self.events: list[dict[str, Any]] = []
        self._reader = reader
        self._writer = writer

    async def qmp(self, command: str, **arguments: object) -> Any:
        message = {"execute": command, "arguments": arguments}
        self._writer.write(json.dumps(message).encode() + b"\n")
        while True:
            reply = await self._receive()
            if "return" in reply:
                return reply["return"]
            assert "error" not in reply, reply

    async def _receive(self) -> dict[str, Any]:
        line = await asyncio.wait_for(self._reader.readline(), 30)
        assert line, "QEMU closed its monitor"
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    async def event(self, name: str) -> dict[str, Any]:
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            await self._receive()


@asynccontextmanager
async def booted(
    directory: Path, *options: str, machine: str = "pc", **more: Any
) -> AsyncIterator[Vm]:
    async with GuestConsole.listen(directory / "serial") as console:
        monitor = directory / "qmp"
        with (directory / "stderr").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                QEMU,
                *guest_arguments(console.path, machine=machine, **more),
                *("-chardev", f"socket,id=qmp,path={monitor},server=on,wait=off"),
                *("-mon", "chardev=qmp,mode=control"),
                *options,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        writer = None
        try:
            try:
                guest = await TinyGuest.ready(console)
            except (GuestError, StalledError) as error:
                error.add_note((directory / "stderr").read_text())
                raise
            reader, writer = await asyncio.open_unix_connection(str(monitor), limit=1 << 20)
            vm = Vm(process, guest, reader, writer)
            await vm._receive()
            await vm.qmp("qmp_capabilities")
            yield vm
        finally:
            if writer is not None:
                writer.close()
            if process.returncode is None:
                process.kill()
            await process.wait()


def disk(directory: Path, name: str, size: str = "64M", form: str = "qcow2") -> list[str]:
    """Make an image; the options of a block node d-NAME on it."""
    path = directory / name
    subprocess.run([QEMU_IMG, "create", "-q", "-f", form, path, size], check=True)
    return [
        "-blockdev",
        f"driver={form},node-name=d-{name},discard=unmap,file.driver=file,file.filename={path}",
    ]


def device(machine: str, node: str) -> list[str]:
    kind = "virtio-blk-device" if machine.startswith("microvm") else "virtio-blk-pci"
    return ["-device", f"{kind},drive=d-{node},id=v-{node}"]


def area(directory: Path, name: str, offset: int, length: int, form: str = "qcow2") -> bytes:
    """Read a range of a closed image."""
    raw = directory / f"{name}.raw"
    subprocess.run(
        [QEMU_IMG, "convert", "-f", form, "-O", "raw", directory / name, raw], check=True
    )
    with raw.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    raw.unlink()
    return data


@pytest.mark.parametrize(
    "machine",
    ["pc", "q35", "microvm", "microvm -global virtio-mmio.force-legacy=false"],
)
async def test_every_command_does_what_it_says(tmp_path: Path, machine: str) -> None:
    name, *options = machine.split()
    async with booted(
        tmp_path, *options, *disk(tmp_path, "a"), *device(name, "a"), machine=name
    ) as vm:
        guest = vm.guest
        (seen,) = (await guest.hello()).disks
        assert (seen.number, seen.kind, seen.size) == (0, "blk", 64 * MIB)
        assert seen.features == {"f", "d", "z"}

        await guest.write(0, MIB, 3 * 65536 + 512, seq=7, seed=0xFFFFFFFF)
        written = stamped(MIB, 3 * 65536 + 512, sequence=7, seed=0xFFFFFFFF)
        assert await guest.read(0, MIB, len(written)) == checksum(written)
        await guest.fill(0, 8 * MIB, 2 * MIB, 0xAA)
        assert await guest.read(0, 8 * MIB, 2 * MIB) == checksum(b"\xaa" * 2 * MIB)
        await guest.write_zeroes(0, 8 * MIB, 65536)
        await guest.discard(0, 9 * MIB, 65536)
        await guest.flush(0)
        await guest.power_off()
        assert await asyncio.wait_for(vm.process.wait(), 120) == 0
    data = area(tmp_path, "a", 0, 10 * MIB)
    assert data[MIB : MIB + len(written)] == written
    pattern = bytearray(b"\xaa" * 2 * MIB)
    pattern[:65536] = pattern[MIB : MIB + 65536] = bytes(65536)
    assert data[8 * MIB :] == bytes(pattern)


@pytest.mark.parametrize("machine", MACHINES)
async def test_stress_then_power_off_leaves_what_was_acknowledged(
    tmp_path: Path, machine: str
) -> None:
    spec = StressSpec(
        offset=3 * MIB, blocks=2048, block_size=4096, total=5000, seed=11, flush_every=500,
        read_percent=10,
    )  # fmt: skip
    async with booted(tmp_path, *disk(tmp_path, "a"), *device(machine, "a"), machine=machine) as vm:
        await vm.guest.stress(spec)
        end = await vm.guest.finish_stress()
        assert (end.issued, end.acked, end.bad, end.errors) == (5000, 5000, 0, 0)
        assert end.flushed > 4000
        assert end.reads > 250
        assert await vm.guest.check() > 1500
        await vm.guest.power_off()
        event = await vm.event("SHUTDOWN")
        assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert await asyncio.wait_for(vm.process.wait(), 120) == 0
    data = area(tmp_path, "a", spec.offset, spec.length)
    assert data == expected_content(spec, 5000)
    assert check_acknowledged(data, spec, end.acked, end.issued).ok
    assert check_point_in_time(data, spec, Bounds(5000, 5000)).sequence == 5000


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no KVM to be used here")
@pytest.mark.parametrize("machine", MACHINES)
async def test_on_kvm(tmp_path: Path, machine: str) -> None:
    """In time for a KVM that interprets the guest, too: a hundred writes a second, at worst."""
    spec = StressSpec(offset=3 * MIB, blocks=64, total=100, seed=11, flush_every=50)
    async with booted(
        tmp_path, *disk(tmp_path, "a"), *device(machine, "a"), machine=machine, accel="kvm"
    ) as vm:
        await vm.guest.write(0, MIB, 65536, seq=7, seed=1)
        assert await vm.guest.read(0, MIB, 65536) == checksum(
            stamped(MIB, 65536, sequence=7, seed=1)
        )
        await vm.guest.stress(spec)
        end = await vm.guest.finish_stress()
        assert (end.acked, end.bad, end.errors) == (100, 0, 0)
        # One that never halts hears the serial port as well, and one with a rate the timer.
        await vm.guest.stress(replace(spec, total=0))
        busy = await vm.guest.progress()
        assert busy.running
        await vm.guest.stop_stress()
        await vm.guest.stress(replace(spec, total=20, rate=100))
        assert (await vm.guest.finish_stress()).acked == 20
        assert len((await vm.guest.reset()).disks) == 1
        await vm.guest.power_off()
        assert await asyncio.wait_for(vm.process.wait(), 120) == 0


@pytest.mark.parametrize("machine", MACHINES)
async def test_reset_starts_the_guest_again(tmp_path: Path, machine: str) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device(machine, "a"), machine=machine) as vm:
        await vm.guest.fill(0, 0, 65536, 0x5A)
        for _ in range(50):  # a guest that asked twice was reset again as it greeted, 1 of 30 times
            assert len((await vm.guest.reset()).disks) == 1
            await vm.event("RESET")
        assert await vm.guest.read(0, 0, 65536) == checksum(b"\x5a" * 65536)


async def test_reset_in_the_middle_of_stress(tmp_path: Path) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        await vm.guest.stress(StressSpec())
        await vm.guest.reset()
        with pytest.raises(GuestError, match="no stress run was started"):
            await vm.guest.progress()


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_the_power_button_switches_the_guest_off(tmp_path: Path, machine: str) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device(machine, "a"), machine=machine) as vm:
        await vm.qmp("system_powerdown")
        assert await asyncio.wait_for(vm.process.wait(), 120) == 0


async def test_lost_writes_are_found(tmp_path: Path) -> None:
    spec = StressSpec(blocks=1024, total=3000, seed=5)
    async with booted(tmp_path, *disk(tmp_path, "a", form="raw"), *_raw_device()) as vm:
        await vm.guest.stress(spec)
        await vm.guest.finish_stress()
        with (tmp_path / "a").open("r+b") as image:  # behind the running guest's back
            image.seek(100 * spec.block_size)
            image.write(bytes(2 * spec.block_size))
        with pytest.raises(GuestError, match=r"2 of .* blocks (.|\n)*bad_lba=800,"):
            await vm.guest.check()
        await vm.guest.power_off()
        await vm.process.wait()
    data = area(tmp_path, "a", 0, spec.length, "raw")
    result = check_acknowledged(data, spec, 3000, 3000)
    assert [fault.block for fault in result.lost] == [100, 101]
    assert not check_point_in_time(data, spec, Bounds(1, 3000)).ok


def _raw_device() -> list[str]:
    return ["-device", "virtio-blk-pci,drive=d-a"]


async def test_verifying_reads_find_what_changed_behind_them(tmp_path: Path) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a", form="raw"), *_raw_device()) as vm:
        await vm.guest.stress(StressSpec(blocks=64, rate=2000, read_percent=90))
        for _ in range(100):
            with (tmp_path / "a").open("r+b") as image:
                image.write(bytes(64 * 4096))
            if (progress := await vm.guest.progress()).bad:
                break
            await asyncio.sleep(0.05)
        assert progress.bad
        assert progress.bad_found == 0
        assert progress.bad_expected


async def test_a_killed_qemu_leaves_what_was_flushed(tmp_path: Path) -> None:
    spec = StressSpec(blocks=4096, seed=3, flush_every=50, queue_depth=32)
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        await vm.guest.stress(spec)
        while not (progress := await vm.guest.progress()).flushed:
            await asyncio.sleep(0.05)
        vm.process.kill()
        await vm.process.wait()
    assert progress.flushed
    data = area(tmp_path, "a", 0, spec.length)
    assert check_acknowledged(data, spec, progress.flushed, progress.issued + 100_000).ok


async def test_a_killed_qemu_loses_what_was_not_flushed_and_it_is_found(tmp_path: Path) -> None:
    # qcow2 keeps its tables in QEMU's memory until a flush: without one they die with it
    spec = StressSpec(blocks=4096, seed=4)
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        await vm.guest.stress(spec)
        while (progress := await vm.guest.progress()).acked < 100:
            await asyncio.sleep(0.05)
        vm.process.kill()
        await vm.process.wait()
    assert progress.acked
    data = area(tmp_path, "a", 0, spec.length)
    result = check_acknowledged(data, spec, progress.acked, progress.issued + 100_000)
    assert result.lost
    assert check_acknowledged(data, spec, progress.flushed, progress.issued + 100_000).ok


async def test_a_backup_under_stress_is_one_point_in_time(tmp_path: Path) -> None:
    spec = StressSpec(blocks=4096, seed=8, queue_depth=24)
    target = disk(tmp_path, "t")
    async with booted(tmp_path, *disk(tmp_path, "a"), *target, *device("pc", "a")) as vm:
        await vm.guest.stress(spec)
        await asyncio.sleep(0.5)
        async with vm.guest.bounds(0) as bounds:
            await vm.qmp("blockdev-backup", **backup("a", "t"))
        await vm.event("BLOCK_JOB_COMPLETED")
        async with vm.guest.bounds(0) as later:
            await asyncio.sleep(0.3)
        end = await vm.guest.stop_stress()
        await vm.guest.power_off()
        await vm.process.wait()
    copy = area(tmp_path, "t", 0, spec.length)
    result = check_point_in_time(copy, spec, bounds[0])
    assert result.ok, str(result)
    assert bounds[0].acked <= result.sequence <= bounds[0].issued < end.issued
    live = area(tmp_path, "a", 0, spec.length)
    assert check_acknowledged(live, spec, end.acked, end.issued).ok
    # What it must not pass on: a stale copy, one from the future, and nothing.
    assert check_point_in_time(copy, spec, later[0]).lost
    assert check_point_in_time(live, spec, bounds[0]).future
    assert check_point_in_time(bytes(spec.length), spec, bounds[0]).lost


def backup(source: str, target: str) -> dict[str, object]:
    ends = {"device": f"d-{source}", "target": f"d-{target}"}
    return {"job-id": f"b-{source}", "sync": "full", **ends}


@pytest.mark.parametrize("together", [True, False])
async def test_disks_in_step_tell_whether_copies_are_of_one_instant(
    tmp_path: Path, together: bool
) -> None:
    """Of different sizes, at different speeds: the fastest waits for the slowest."""
    wanted = [
        StressSpec(disk=i, blocks=256 << i, block_size=(512, 4096, 16384)[i], seed=i + 1)
        for i in range(3)
    ]
    options: list[str] = []
    for name in "abc":
        options += [*disk(tmp_path, name), *device("pc", name), *disk(tmp_path, f"t{name}")]
    async with booted(tmp_path, *options) as vm:
        specs = await vm.guest.stress_in_step(*wanted)
        await asyncio.sleep(0.3)
        async with vm.guest.bounds(0, 1, 2) as bounds:
            if together:
                actions = [{"type": "blockdev-backup", "data": backup(n, f"t{n}")} for n in "abc"]
                await vm.qmp("transaction", actions=actions)
            else:
                for name in "abc":
                    await vm.qmp("blockdev-backup", **backup(name, f"t{name}"))
                    enough = (await vm.guest.progress(0)).acked + 100
                    while (await vm.guest.progress(0)).acked < enough:
                        await asyncio.sleep(0.01)
        for _ in "abc":
            await vm.event("BLOCK_JOB_COMPLETED")
        ends = [await vm.guest.stop_stress(spec.disk) for spec in specs]
        await vm.guest.power_off()
        await vm.process.wait()
    issued = [end.issued for end in ends]
    assert min(issued) > 200
    assert all(end.errors == 0 for end in ends)
    copies = {
        n: Taken(area(tmp_path, f"t{n}", 0, spec.length), spec, bounds[spec.disk])
        for n, spec in zip("abc", specs, strict=True)
    }
    for name, copy in copies.items():
        assert check_point_in_time(*copy).ok, name
    result = check_one_instant(copies)
    assert result.ok == together, str(result)
    if not together:
        assert [name for name, found in result.disks.items() if not found.ok] == ["a", "b"]


async def test_runs_in_step_begin_together_and_end_together(tmp_path: Path) -> None:
    options = [*disk(tmp_path, "a"), *device("pc", "a"), *disk(tmp_path, "b"), *device("pc", "b")]
    async with booted(tmp_path, *options) as vm:
        with pytest.raises(GuestError, match="has the disk itself among its members"):
            await vm.guest._do("stress 0 0 64 8 4 0 1 0 0 0 2", 5)
        with pytest.raises(GuestError, match="no disk has such a number"):
            await vm.guest._do("stress 0 0 64 8 4 0 1 0 0 0 65537", 5)
        for _ in range(2):  # a second run finds what the first left
            first = StressSpec(disk=0, blocks=64, queue_depth=4, total=1000, group=(0, 1))
            await vm.guest.stress(first)
            await asyncio.sleep(0.1)
            assert (await vm.guest.progress(0)).issued == 0
            await vm.guest.stress(replace(first, disk=1))
            for number in (0, 1):
                end = await vm.guest.finish_stress(number)
                assert (end.acked, end.errors) == (1000, 0)
        await vm.guest.stress_in_step(StressSpec(disk=0), StressSpec(disk=1))
        await vm.guest.stop_stress(1)
        await asyncio.sleep(0.1)
        held = await vm.guest.progress(0)
        assert held.running
        assert held.issued == (await vm.guest.progress(1)).acked + StressSpec().queue_depth
        with pytest.raises(RangeError, match="on one disk each"):
            await vm.guest.stress_in_step(StressSpec(), StressSpec())
        with pytest.raises(RequestError, match="name the disks"):
            async with vm.guest.bounds():
                pass


async def test_several_disks_under_stress_at_once(tmp_path: Path) -> None:
    specs = [
        StressSpec(disk=i, blocks=1024 << i, block_size=(512, 4096, 65536)[i], seed=i, total=1500)
        for i in range(3)
    ]
    options: list[str] = []
    for name in "abc":
        options += [*disk(tmp_path, name, "1G"), *device("pc", name)]
    async with booted(tmp_path, *options) as vm:
        for spec in specs:
            await vm.guest.stress(spec)
        await vm.guest.write(0, 512 * MIB, 4096, seq=1, seed=1)  # a command among them
        for spec in specs:
            end = await vm.guest.finish_stress(spec.disk)
            assert (end.acked, end.bad, end.errors) == (1500, 0, 0)
            await vm.guest.check(spec.disk)
        await vm.guest.power_off()
        await vm.process.wait()
    for spec, name in zip(specs, "abc", strict=True):
        data = area(tmp_path, name, spec.offset, spec.length)
        assert check_acknowledged(data, spec, 1500, 1500).ok


async def test_terabytes_are_addressed_whole(tmp_path: Path) -> None:
    size, far = 6 << 40, (6 << 40) - 16 * MIB
    spec = StressSpec(offset=far, blocks=256, total=500)
    async with booted(tmp_path, *disk(tmp_path, "a", "6T"), *device("pc", "a")) as vm:
        assert (await vm.guest.hello()).disks[0].size == size
        await vm.guest.stress(spec)
        await vm.guest.finish_stress()
        expected = expected_content(spec, 500)
        assert await vm.guest.read(0, far, spec.length) == checksum(expected)
        assert await vm.guest.read(0, far % (1 << 41), spec.length) == checksum(bytes(spec.length))
        with pytest.raises(GuestError, match="past the end"):
            await vm.guest.stress(StressSpec(offset=size - 512))
        with pytest.raises(GuestError, match="failed the request status=1") as caught:
            await vm.guest.fill(0, size, 512, 1)
        assert caught.value.status == 1


@pytest.mark.parametrize("machine", MACHINES)
async def test_scsi_disks(tmp_path: Path, machine: str) -> None:
    kind = "virtio-scsi-device" if machine == "microvm" else "virtio-scsi-pci"
    options = [
        *disk(tmp_path, "a"),
        *disk(tmp_path, "b", "5T"),
        *("-device", f"{kind},id=scsi"),
        *("-device", "scsi-hd,drive=d-a,bus=scsi.0,scsi-id=3,lun=2,id=v-a"),
        *("-device", "scsi-hd,drive=d-b,bus=scsi.0,scsi-id=1,id=v-b"),
    ]
    spec = StressSpec(disk=1, blocks=512, total=2000, flush_every=100, read_percent=20)
    async with booted(tmp_path, *options, machine=machine) as vm:
        guest = vm.guest
        first, second = (await guest.hello()).disks
        assert first.where.endswith("/1:0")
        assert second.where.endswith("/3:2")
        assert (first.size, second.size) == (5 << 40, 64 * MIB)
        await guest.fill(0, 4 << 40, MIB, 0xBB)
        await guest.write_zeroes(0, (4 << 40) + 65536, 65536)
        await guest.discard(0, (4 << 40) + 2 * 65536, 65536)
        expected = b"\xbb" * 65536 + bytes(2 * 65536) + b"\xbb" * 65536
        assert await guest.read(0, 4 << 40, len(expected)) == checksum(expected)
        await guest.flush(0)
        await guest.stress(spec)
        end = await guest.finish_stress(1)
        assert (end.acked, end.bad, end.errors) == (2000, 0, 0)
        assert end.flushed
        # an unplug that needs no guest, in the middle of a run
        await guest.stress(StressSpec(disk=1, blocks=512))
        await vm.qmp("device_del", id="v-a")
        await vm.event("DEVICE_DELETED")
        end = await guest.finish_stress(1)
        assert end.errors
        assert [d.number for d in (await guest.rescan()).disks] == [0]
        await guest.power_off()
        await vm.process.wait()


async def test_an_idle_run_on_an_unplugged_scsi_disk_ends(tmp_path: Path) -> None:
    options = [*disk(tmp_path, "a"), "-device", "virtio-scsi-pci,id=scsi"]
    async with booted(tmp_path, *options, "-device", "scsi-hd,drive=d-a,bus=scsi.0,id=v-a") as vm:
        await vm.guest.stress(StressSpec(rate=1))
        await vm.qmp("device_del", id="v-a")
        assert (await vm.guest.rescan()).disks == ()
        with pytest.raises(GuestError, match="no disk has this number"):
            await vm.guest.progress()
        console = vm.guest.console  # its next turn says so, after commands that wait
        assert await console.wait("the end of its run", lambda: console.take_done(0), 10)


async def _unplugged(vm: Vm, name: str) -> None:
    await vm.qmp("device_del", id=name)
    for _ in range(50):
        if await vm.guest.eject():
            break
        await asyncio.sleep(0.1)
    deleted = await vm.event("DEVICE_DELETED")
    while deleted["data"].get("device") != name:
        deleted = await vm.event("DEVICE_DELETED")


@pytest.mark.parametrize("how", ["pc", "q35", "q35 native"])
async def test_disks_come_and_go(tmp_path: Path, how: str) -> None:
    machine, _, native = how.partition(" ")
    options = [*disk(tmp_path, "a"), *disk(tmp_path, "b")]
    first, bus = device(machine, "a"), None
    if machine == "q35":
        options += ["-device", "pcie-root-port,id=port0,chassis=1"]
        options += ["-device", "pcie-root-port,id=port1,chassis=2"]
        first, bus = ["-device", "virtio-blk-pci,drive=d-a,bus=port0,id=v-a"], "port1"
    if native:
        options += ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
    async with booted(tmp_path, *options, *first, machine=machine) as vm:
        guest = vm.guest
        assert len((await guest.hello()).disks) == 1
        await guest.stress(StressSpec(offset=MIB, blocks=256, rate=500, read_percent=30))
        for turn in range(3):
            where = {"bus": bus} if bus else {}
            await vm.qmp("device_add", driver="virtio-blk-pci", drive="d-b", id="v-b", **where)
            seen = await guest.rescan()
            assert [d.number for d in seen.disks] == [0, 1]
            await guest.fill(1, 0, MIB, turn + 1)
            assert await guest.read(1, 0, MIB) == checksum(bytes([turn + 1]) * MIB)
            await _unplugged(vm, "v-b")
            assert [d.number for d in (await guest.hello()).disks] == [0]
            await guest.fill(0, 0, 65536, turn)
        end = await guest.stop_stress()  # the other disk's run went on all the while
        assert end.acked
        assert (end.bad, end.errors) == (0, 0)
        await guest.check()
        with pytest.raises(GuestError, match="no disk has this number"):
            await guest.flush(1)


async def test_a_resized_disk_is_seen(tmp_path: Path) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        await vm.qmp("block_resize", **{"node-name": "d-a", "size": 100 * MIB})
        assert (await vm.guest.hello()).disks[0].size == 100 * MIB
        await vm.guest.fill(0, 99 * MIB, MIB, 1)


async def test_a_read_only_disk_is_named_and_refuses(tmp_path: Path) -> None:
    node = disk(tmp_path, "a")
    node[1] += ",read-only=on"
    async with booted(tmp_path, *node, *device("pc", "a")) as vm:
        assert "r" in (await vm.guest.hello()).disks[0].features
        with pytest.raises(GuestError, match="failed the request"):
            await vm.guest.fill(0, 0, 512, 1)


async def test_latency_tells_how_long_requests_were_held(tmp_path: Path) -> None:
    options = [*disk(tmp_path, "a"), "-object", "throttle-group,id=slow,x-iops-total=4"]
    options += ["-blockdev", "driver=throttle,node-name=d-t,throttle-group=slow,file=d-a"]
    async with booted(tmp_path, *options, *device("pc", "t")) as vm:
        await vm.guest.stress(StressSpec(queue_depth=2, blocks=64))
        await asyncio.sleep(2)
        latency = await vm.guest.latency()
        assert latency.requests
        # 4 requests a second, two in flight: half a second each, by the guest's own clock
        assert 200_000 < latency.longest_us < 15_000_000
        assert latency.mean_us <= latency.longest_us <= latency.held_us
        again = await vm.guest.latency()
        assert again.requests < latency.requests
        await vm.guest.stop_stress()


async def test_rate_limits_the_writer(tmp_path: Path) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        await vm.guest.stress(StressSpec(rate=100, queue_depth=4))
        began = time.monotonic()
        await writes_on(vm.guest, count=200)
        took = time.monotonic() - began
        end = await vm.guest.stop_stress()
        assert took > 1  # and without a limit a moment
        assert not end.running


async def test_a_silent_guest_is_a_stall_and_its_late_answer_confuses_nobody(
    tmp_path: Path,
) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        await vm.qmp("stop")
        with pytest.raises(StalledError, match=r"silent for 0\.3 s") as caught:
            await vm.guest.hello(stall=0.3)
        assert "> 1 hello" in str(caught.value)
        await vm.qmp("cont")
        await vm.guest.fill(0, 0, 512, 3)
        assert await vm.guest.read(0, 0, 512) == checksum(b"\x03" * 512)


async def test_a_qemu_that_dies_is_said_so(tmp_path: Path) -> None:
    async with booted(tmp_path, *disk(tmp_path, "a"), *device("pc", "a")) as vm:
        vm.process.kill()
        await vm.process.wait()
        with pytest.raises(GuestError, match="closed"):
            await vm.guest.hello()


async def test_stress_lives_through_migration(tmp_path: Path) -> None:
    spec = StressSpec(blocks=1024, seed=77, rate=2000, read_percent=20)
    source_path, destination_path = tmp_path / "source", tmp_path / "destination"
    source_path.mkdir()
    destination_path.mkdir()
    node = disk(tmp_path, "a", form="raw")
    options = [*node, *device("pc", "a")]
    uri = f"unix:{tmp_path}/migration"
    async with booted(source_path, *options, memory_mib=32) as source:
        await source.guest.stress(spec)
        await source.guest.dirty(8)
        async with GuestConsole.listen(destination_path / "serial") as console:
            destination = await asyncio.create_subprocess_exec(
                QEMU,
                *guest_arguments(console.path, memory_mib=32),
                *("-chardev", "null,id=qmp", "-mon", "chardev=qmp,mode=control"),
                *options,
                *("-incoming", uri),
            )
            try:
                while not peers.listens(uri.removeprefix("unix:")):
                    await asyncio.sleep(0.02)
                await source.qmp("migrate", uri=uri)
                while (await source.qmp("query-migrate"))["status"] != "completed":
                    await asyncio.sleep(0.05)
                guest = await TinyGuest.attach(console)
                before = await guest.progress()
                assert before.running
                await writes_on(guest)
                end = await guest.stop_stress()
                assert (end.bad, end.errors) == (0, 0)
                await guest.check()
                await guest.power_off()
                await asyncio.wait_for(destination.wait(), 120)
            finally:
                if destination.returncode is None:
                    destination.kill()
                    await destination.wait()
    data = area(tmp_path, "a", spec.offset, spec.length, "raw")
    assert check_acknowledged(data, spec, end.acked, end.issued).ok


def test_the_committed_rom_is_what_its_sources_make() -> None:
    for program in ("make", "gcc", "ld", "objcopy"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    version = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True)
    if version.stdout.strip().split(".")[0] != "12":
        pytest.skip(f"gcc is {version.stdout.strip()}; the ROM was made with 12")
    done = subprocess.run(
        ["make", "-C", FIRMWARE.parent, "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("guest.rom is what its sources make", done.stdout)
