"""Backups of running disks: chains of them over time, and what decides what the next one is."""

import json
import os
from pathlib import Path

import pytest
from fleecing import MIB, begin_writing, ran

import qmpblock
from qmpblock import names
from qmpblock.backups.check import check_backups
from qmpblock.backups.restore import restore
from qmpblock.errors import Error, RequestError
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec, check_point_in_time

pytestmark = pytest.mark.live

TWO = """
about: Two disks, one of them a chain.
disks:
  - images: [{format: raw, size: 16M, content: [write 0 6M 0xaa]}, {content: [write 1M 1M 0xcc]}]
  - images: [{size: 16M, content: [write 0 6M 0xbb]}]
"""
#: The guest stamps the last half of each disk.
SPECS = tuple(
    StressSpec(
        disk=number, offset=8 * MIB, blocks=2048, block_size=4096, queue_depth=8, seed=5, rate=150
    )
    for number in (0, 1)
)


#: What the invariant finds, and the pages promise.
STAYS = r"appeared: bitmap: qmpblock-backup-[0-9a-f]{8}-[0-9a-f]{8}-\d(-end|-open)? of d\d, .*"


async def backed_up(vm, directory, **options):
    """Back up all disks of a VM; return the result, and what of its guest's writes is in it."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        job = controller.backup(directory, disks, **options)
        async with vm.guest.bounds(0, 1) as bounds:
            made = await job.__aenter__()
        await job.__aexit__(None, None, None)
    return made.result, bounds


async def content(directory, image):
    """Return what a guest would read from an image, by qemu-img alone."""
    raw = directory.parent / "content.raw"
    path = directory / image
    code, out = await ran("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert code == 0, out
    data = raw.read_bytes()
    raw.unlink()
    return data


async def check_content(directory, result, bounds):
    """See that each image, with what it lies on, is its disk as it was at one instant."""
    for number, one in enumerate(result.point.disks):
        data = await content(directory, one.file)
        found = check_point_in_time(data[8 * MIB :], SPECS[number], bounds[number])
        assert found.ok, (one, found)
        code, out = await ran("qemu-img", "check", "-f", "qcow2", directory / one.file)
        assert code == 0, out


async def bitmaps_of(vm):
    """Return the dirty bitmaps of a VM's nodes, as (node, name)."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    return sorted(
        (node["node-name"], one["name"]) for node in nodes for one in node.get("dirty-bitmaps", ())
    )


async def check_left(vm, result):
    """See that what stays in the VM is what the result documents, and nothing else of backups."""
    point = result.point
    every = [names.backup_bitmap(point.backups, point.id, number) for number in (0, 1)]
    kinds = ("", "-end", "-open")
    wanted = [(f"d{n}", every[n] + kind) for n in (0, 1) for kind in kinds]
    assert await bitmaps_of(vm) == wanted
    assert [one.bitmap for one in point.disks] == every


async def test_increments_hold_the_instant(start_qemu, vm_dir, invariant):
    """Of disks that a guest writes to all the time, each chain read by qemu-img alone."""
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    invariant.expect(STAYS)
    await begin_writing(vm, *SPECS, first=1)
    place = vm_dir / "backups"
    made = [await backed_up(vm, place) for _ in range(4)]
    await vm.guest.stop_stress()
    kinds = [[one.kind for one in result.point.disks] for result, _ in made]
    assert kinds == [["full", "full"], *[["incremental", "incremental"]] * 3]
    for result, bounds in made:
        await check_content(place, result, bounds)
        assert json.loads((place / f"{result.point.when}.json").read_text())["format"] == 1
    await check_left(vm, made[-1][0])
    assert all(result.warnings == () for result, _ in made)
    files = {path.name for path in place.iterdir()}
    listed = {one.file for result, _ in made for one in result.point.disks}
    assert files == listed | {f"{r.point.when}.json" for r, _ in made} | {names.BACKUP_LOCK_FILE}


async def test_it_is_tested_and_restored_without_the_vm(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    invariant.expect(STAYS)
    await begin_writing(vm, *SPECS, first=1)
    place = vm_dir / "backups"
    made = [(await backed_up(vm, place))[0] for _ in range(3)]
    checked = await check_backups(place)
    assert checked.whole
    assert checked.others == ()
    assert [one.when for one in checked.points] == [one.point.when for one in made]
    assert checked.read == sum(one.length for result in made for one in result.point.disks)
    for result in made:
        target = vm_dir / f"restored-{result.point.when}"
        restored = await restore(place, target, at=result.point.when)
        assert [one.target for one in restored.disks] == [
            str(target / "vd0.qcow2"),
            str(target / "vd1.qcow2"),
        ]
        for one, backup in zip(restored.disks, result.point.disks, strict=True):
            assert await content(target, Path(one.target).name) == await content(place, backup.file)
            code, out = await ran("qemu-img", "info", "--output=json", one.target)
            assert code == 0
            assert "backing-filename" not in out
    last = made[-1].point
    with pytest.raises(RequestError, match="exists already"):
        await restore(place, target)
    again = await restore(place, target, disks=["vd1"], force=True)
    assert [one.disk for one in again.disks] == ["vd1"]
    assert again.time == last.time
    await damaged(place, made, vm_dir / "damaged")


async def damaged(place, made, target):
    """See that a byte that is another one is found, and nothing is restored of it."""
    first, second, third = (result.point for result in made)
    file = place / second.disks[0].file
    data, state = bytearray(file.read_bytes()), file.stat()
    data[-1000] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    checked = await check_backups(place)
    faults = {one.when: one.faults for one in checked.points}
    wrong = (f"{file.name} holds something else than it did",)
    assert faults == {first.when: (), second.when: wrong, third.when: wrong}
    assert not checked.whole
    with pytest.raises(Error, match="holds something else than it did") as caught:
        await restore(place, target)
    assert caught.value.standing == "nothing was touched"
    assert not target.exists()
    await restore(place, target, at=first.when)
    assert sorted(one.name for one in target.iterdir()) == ["vd0.qcow2", "vd1.qcow2"]
