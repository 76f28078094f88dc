"""Migrations of disks drawn by chance, and broken off again and again: `make soak`."""

import asyncio
import contextlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from disturbed import nothing_of_ours
from migrating import ALIKE, arrived, machine, migrated, stressed, to_newer
from migratinglinux import log_goes_over
from migrationkills import STRUCK, kill_matrix
from migrationoutcomes import INTERRUPTED, WIRE_CUT
from migrationrounds import migrations_under_stress
from rounds import rounds

from qmpblock.errors import DisconnectedError
from qmpblock.migration.passage import Passage
from qmpblock.migration.states import Phase
from qmpblock.testing import Tools, build, parse_scenario
from qmpblock.testing.linux import LinuxImage

pytestmark = [pytest.mark.live, pytest.mark.soak]


async def test_any_disks_go_over(start_qemu, start_destination, vm_dir, qemu_binary, qemu_version):
    count, chance = rounds(100)
    where = (start_qemu, start_destination, vm_dir, qemu_binary, qemu_version)
    print(await migrations_under_stress(*where, chance, count))


@pytest.mark.needs_qemu("< 8", reason="the machine type of 7.2 is what both know")
async def test_any_disks_go_over_to_a_newer_qemu(
    start_qemu, start_destination, vm_dir, qemu_binary, qemu_version
):
    count, chance = rounds(50)
    where = (start_qemu, start_destination, vm_dir, qemu_binary, qemu_version)
    print(await migrations_under_stress(*where, chance, count, **to_newer()))


async def test_a_linux_goes_over(vm_dir, qemu_binary):
    count, _ = rounds(10)
    image = await LinuxImage.prepare(qemu_binary)
    for number in range(count):
        room = vm_dir / f"round{number}"
        room.mkdir()
        await log_goes_over(image, image, room, qemu_binary)


#: `max` is another CPU to each QEMU; this one says as much by CPUID to both.
BOTH_KNOW = ("-cpu", "qemu64,+rdrand", *ALIKE)


@pytest.mark.needs_qemu("< 8", reason="the machine type of 7.2 is what both know")
async def test_a_linux_goes_over_to_a_newer_qemu(vm_dir, qemu_binary):
    newer = to_newer()["there"]["qemu"]
    count, _ = rounds(10)
    image = await LinuxImage.prepare(qemu_binary, options=BOTH_KNOW)
    there = replace(image, qemu=newer, options=(*BOTH_KNOW, "-machine", "pc-q35-7.2"))
    for number in range(count):
        room = vm_dir / f"round{number}"
        room.mkdir()
        await log_goes_over(image, there, room, qemu_binary)


WAYS = ("exports", "daemon")
ROWS = [
    (struck, way)
    for struck in (*STRUCK, *INTERRUPTED)
    if struck != WIRE_CUT
    for way in WAYS
    if way == "daemon" or not struck.startswith("storage daemon")
]


@pytest.mark.parametrize(("struck", "way"), ROWS)
async def test_struck_at_every_command(
    struck, way, start_qemu, start_destination, vm_dir, qemu_binary
):
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    await kill_matrix(struck, *where, storage_daemon=way == "daemon")


async def test_the_wire_cut_at_every_command(
    ssh_host, start_qemu, start_destination, vm_dir, qemu_binary
):
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    await kill_matrix(WIRE_CUT, *where, host=ssh_host)


#: Those in which it is broken off; it comes to no other, for one guest is to stay.
PHASES = tuple(phase for phase in Phase if phase.before(Phase.HANDED))
MOST = 16 << 20  # bytes that QEMU may have come to hold, of all the attempts together


async def test_broken_off_at_any_moment_then_made(
    start_qemu, start_destination, vm_dir, qemu_binary, monkeypatch
):
    count, chance = rounds(100)
    text = machine(2, device=chance.choice(["virtio-blk", "virtio-scsi"]))
    built = await build(parse_scenario(text, "source"), vm_dir / "source", Tools.of(qemu_binary))
    source = await stressed(await start_qemu(built, guest=True))
    destination = await start_destination(source)
    tally, held = Counter(), []
    for _ in range(count):
        destination.expect_exit()
        phase, kill = chance.choice(PHASES), chance.random() < 0.2
        with entered(monkeypatch, phase) as come:
            running = asyncio.create_task(migrated(source, destination))
            await asyncio.wait({running, come}, return_when=asyncio.FIRST_COMPLETED)
            if phase not in (Phase.HELD, Phase.ENDED, Phase.SENT):  # which are over in no time
                await asyncio.wait({running}, timeout=chance.uniform(0, 0.1))
            if kill:
                await destination.kill()
            running.cancel()
            await asyncio.wait({running})
        shown = (await source.execute("query-status"))["status"]
        assert shown == "running", (phase, kill, running.exception())
        assert await source.execute("query-jobs") == []
        await nothing_of_ours(source)
        done = await source.guest.progress()
        assert (done.bad, done.errors) == (0, 0)
        tally[phase.value] += 1
        held.append(resident(source))
        waits = None
        with contextlib.suppress(DisconnectedError):  # it has been told to end, or was killed
            waits = (await destination.execute("query-status"))["status"]
        if waits != "inmigrate":
            await destination.close()
            destination = await start_destination(source)
    print(f"{count} rounds: {dict(tally)}")
    warm, last = held[len(held) // 10], held[-1]
    print(f"the source held {warm >> 10} KiB after a tenth of them, {last >> 10} KiB at last")
    assert last < warm + MOST
    await arrived(source, destination, await migrated(source, destination))


@contextlib.contextmanager
def entered(monkeypatch, phase):
    """Yield a future that comes when a migration enters a phase; none is handed over meanwhile."""
    come = asyncio.get_running_loop().create_future()
    before = Passage.enter

    async def enter(self, now, **how):
        await before(self, now, **how)
        if now is phase and not come.done():
            come.set_result(None)
            await asyncio.sleep(0)
        if now is Phase.LANDED:
            await asyncio.Event().wait()

    if phase is Phase.CHECKED:  # in which it is from the beginning
        come.set_result(None)
    with monkeypatch.context() as patch:
        patch.setattr(Passage, "enter", enter)
        yield come


def resident(vm):
    """Return how much memory a QEMU holds, in bytes."""
    fields = Path(f"/proc/{vm.pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
