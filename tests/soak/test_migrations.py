"""Migrations of disks drawn by chance, and broken off again and again: `make soak`."""

import asyncio
import json
import time
from dataclasses import replace

import pytest
from chains import cli
from migrating import ALIKE, machine, to_newer
from migratinglinux import log_goes_over
from migrationattempts import broken_off_then_made
from migrationkills import SHAPES, STRUCK, TELLING, THEIRS, kill_matrix
from migrationoutcomes import INTERRUPTED, WIRE_CUT
from migrationrounds import migrations_under_stress
from rounds import rounds

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


@pytest.mark.parametrize("struck", TELLING)
@pytest.mark.parametrize("shape", SHAPES)
async def test_another_shape_struck_at_every_command(
    shape, struck, start_qemu, start_destination, vm_dir, qemu_binary
):
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    await kill_matrix(struck, *where, shape=SHAPES[shape])


@pytest.mark.parametrize("shape", [None, "shared", "two scsi", "top"])
@pytest.mark.parametrize("theirs", THEIRS)
async def test_somebody_else_at_every_command(
    theirs, shape, start_qemu, start_destination, vm_dir, qemu_binary
):
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    await kill_matrix(theirs, *where, shape=SHAPES.get(shape))


async def test_the_wire_cut_at_every_command(
    ssh_host, start_qemu, start_destination, vm_dir, qemu_binary
):
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    await kill_matrix(WIRE_CUT, *where, host=ssh_host)


BY_SSH = ("controller", "destination", "all", "storage daemon", "destination hangs", WIRE_CUT)


@pytest.mark.parametrize("struck", BY_SSH)
async def test_with_a_daemon_there_struck_at_every_command(
    struck, ssh_host, start_qemu, start_destination, vm_dir, qemu_binary
):
    """A storage daemon by ssh has the destination's images."""
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    await kill_matrix(struck, *where, host=ssh_host, storage_daemon=True)


LIMIT = 8 << 20  # bytes a second, of a list
AT_ONCE = 16 << 20  # bytes that QEMU's mirror sends before it rests
HELD = "content: [write 0 8M 0xaa, write 24M 30M 0xbb]"


async def test_a_list_keeps_to_its_limit_as_its_images_grow(
    start_qemu, start_destination, vm_dir, qemu_binary
):
    """Five VMs, two at a time, of which one fails on the way: what files say, not we."""
    pairs, lines = [], []
    text = machine().replace("content: [write 0 8M 0xaa]", HELD)
    for number in range(5):
        place = vm_dir / f"source{number}"
        built = await build(parse_scenario(text, "source"), place, Tools.of(qemu_binary))
        source = await start_qemu(built, guest=True)  # which writes nothing
        destination = await start_destination(source)
        pairs.append((source, destination))
        lines.append(
            f"  - {{source: {source.monitor_path}, destination: {destination.monitor_path}}}\n"
        )
    file = vm_dir / "list.yaml"
    file.write_text(f"parallel: 2\nspeed: {LIMIT}\nvms:\n" + "".join(lines))
    images = [vm.disks[0].active.path for _, vm in pairs]

    def held():
        return [image.stat().st_blocks * 512 for image in images]

    failing, first = pairs[1][1], held()
    failing.expect_exit()
    running = asyncio.create_task(cli("migrate", "--list", str(file), "--json"))
    seen = [(time.monotonic(), first)]
    while not running.done():
        await asyncio.sleep(0.1)
        seen.append((time.monotonic(), held()))
        if failing.running and seen[-1][1][1] - first[1] > 12 << 20:
            await failing.kill()
    code, out, err = await running
    assert code == 1, err
    states = [one["state"] for one in json.loads(out)["migrations"]]
    assert states == ["done", "failed", "done", "done", "done"]
    grown = [(at, sum(now) - sum(first)) for at, now in seen]
    pace = max(
        (much - had - 2 * AT_ONCE) / (later - at)
        for at, had in grown
        for later, much in grown
        if later - at >= 4
    )
    begun = next(at for at, much in grown if much)
    ended, whole = next((at, much) for at, much in grown if much == grown[-1][1])
    print(f"at most {pace / LIMIT:.2f} of the limit in any four seconds, but for a burst of each")
    print(
        f"{whole >> 20} MiB in {ended - begun:.1f} s: {whole / (ended - begun) / LIMIT:.2f} of it"
    )
    assert pace < 1.05 * LIMIT
    assert whole / (ended - begun) < 1.2 * LIMIT  # with the first burst, for which none is waited


MOST = 16 << 20  # bytes that QEMU may have come to hold, of all the attempts together


async def test_broken_off_at_any_moment_then_made(begin, start_destination, monkeypatch):
    """Of one guest, a hundred times: a slice does all of these, however few rounds it is given."""
    count, chance = rounds(100)
    tally = await broken_off_then_made(
        begin, start_destination, monkeypatch, chance, max(count, 100)
    )
    print(tally)
    warm, last = tally.held[len(tally.held) // 10], tally.held[-1]
    print(f"the source held {warm >> 10} KiB after a tenth of them, {last >> 10} KiB at last")
    assert last < warm + MOST
