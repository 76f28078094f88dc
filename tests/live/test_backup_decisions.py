"""What happens to a disk between two backups, and what the next one is then: right in any case."""

import contextlib
import errno
import json
import os
import shlex
from pathlib import Path

import pytest
from fleecing import MIB, ran

import qmpblock
from qmpblock.backups import run
from qmpblock.backups.bitmaps import make_bitmaps
from qmpblock.errors import (
    BusyError,
    CommandError,
    DisconnectedError,
    Error,
    JobError,
    RequestError,
    UnsupportedError,
)
from qmpblock.host.ourfiles import Directory
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

QCOW2 = "about: A disk.\nimages: [{size: 16M, content: [write 0 6M 0xbb]}]"
RAW = "about: A raw one.\nimages: [{format: raw, size: 16M, content: [write 0 6M 0xbb]}]"
DATA_FILE = (
    "about: d\nimages: [{size: 16M, data_file: d0.data, options: {data_file_raw: on}, "
    "content: [write 0 6M 0xbb]}]"
)
TWO = """\
about: Two disks.
disks:
- images: [{format: raw, size: 1M}]
- images: [{size: 1M}]
"""
QCOW2S = TWO.replace("format: raw, ", "")
#: As a guest writes data, zeros and discards.
WRITES = ("write -P {} 1M 300k", "write -z 3M 1M", "discard 5M 1M", "write -P {} 15M 1M")


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary, invariant):
    """Start a VM on the images of a scenario, or again on those that there are."""
    built = []

    async def started(scenario=None):
        if scenario is not None:
            tools = Tools.of(qemu_binary)
            built[:] = [await build(parse_scenario(scenario, "d"), vm_dir / "images", tools)]
        vm = await start_qemu(built[0])
        invariant.forget(vm)  # bitmaps stay, and what is done to it here is beyond description
        return vm

    return started


async def backed_up(vm, place, disk=None, **options):
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = [one for one in await controller.disks() if disk in (None, one.name)]
        async with controller.backup(place, disks, **options) as job:
            pass
    [one] = job.result.point.disks
    return one, job.result


async def write(vm, byte):
    for command in WRITES:
        await vm.qemu_io("d0", command.format(byte))


async def raw_of(fmt, path):
    """Return what a closed image holds, for QEMU's own tools."""
    raw = path.parent / "content.raw"
    code, out = await ran("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", path, raw)
    assert code == 0, out
    data = raw.read_bytes()
    raw.unlink()
    return data


async def held(vm, place, one):
    """See that a backup holds what the disk does, when the VM is off."""
    found = await raw_of("qcow2", place / one.file)
    await vm.quit()
    assert found == await raw_of(one.format, place.parent / "images" / Path(one.source).name)


async def test_dirty_zeros_are_zeros(begin, vm_dir):
    """Neither data, nor left out: what lies below would be seen."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    await backed_up(vm, place)
    await write(vm, 7)
    one, result = await backed_up(vm, place)
    assert (one.kind, result.warnings) == ("incremental", ())
    code, out = await ran("qemu-img", "map", "-f", "qcow2", "--output=json", place / one.file)
    assert code == 0
    zeros = [e for e in json.loads(out) if e["start"] <= 3 * MIB < e["start"] + e["length"]]
    assert (zeros[0]["depth"], zeros[0]["zero"], zeros[0]["data"]) == (0, True, False)
    assert one.copied < 6 * MIB
    await held(vm, place, one)


async def test_a_vm_that_was_shut_down_goes_on(begin, vm_dir):
    vm, place = await begin(QCOW2), vm_dir / "b"
    one, _ = await backed_up(vm, place)
    assert one.persistent
    await write(vm, 7)
    await vm.quit()
    vm = await begin()
    one, result = await backed_up(vm, place)
    assert (one.kind, result.warnings) == ("incremental", ())
    await held(vm, place, one)


@pytest.mark.parametrize("stored", [False, True], ids=["of-its-life", "stored"])
async def test_a_vm_that_was_killed(stored, begin, vm_dir):
    """QEMU has stored no bitmap, or one that does not count any more."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    await backed_up(vm, place)
    if stored:
        await vm.quit()
        vm = await begin()
    await write(vm, 7)
    await vm.kill()
    vm = await begin()
    with pytest.raises(RequestError, match="cannot be incremental"):
        await backed_up(vm, place, kind="incremental")
    one, result = await backed_up(vm, place)
    assert one.kind == "full"
    said = "QEMU or its host died since" if not stored else "QEMU or its host died since the last"
    assert said in one.reason
    assert result.warnings == (f"the backup of vd0 is full: {one.reason}",)
    one, _ = await backed_up(vm, place)
    assert one.kind == "incremental"
    await held(vm, place, one)


async def test_a_raw_disk_is_incremental_while_qemu_lives(begin, vm_dir):
    vm, place = await begin(RAW), vm_dir / "b"
    one, _ = await backed_up(vm, place)
    assert one.bitmap
    assert not one.persistent
    await write(vm, 7)
    one, _ = await backed_up(vm, place)
    assert one.kind == "incremental"
    await vm.quit()
    vm = await begin()
    one, result = await backed_up(vm, place)
    assert "the image, raw, did not keep it" in one.reason
    assert len(result.warnings) == 1
    await held(vm, place, one)


async def test_a_disk_that_was_smaller_for_a_while(begin, vm_dir):
    """Its bitmap has lost what was there, and does not say so."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    await backed_up(vm, place)
    await vm.qemu_io("d0", "write -P 7 15M 64k")
    for size in (8 * MIB, 16 * MIB):
        await vm.execute("block_resize", node_name="d0", size=size)
    one, _ = await backed_up(vm, place)
    assert "was made smaller meanwhile" in one.reason
    await held(vm, place, one)


async def test_a_disk_that_was_smaller_while_it_is_backed_up(begin, vm_dir, monkeypatch):
    """After the look at its bitmap: an increment would leave out what that has lost."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    await backed_up(vm, place)
    await vm.qemu_io("d0", "write -P 7 15M 64k")

    async def resized(*arguments):
        for size in (8 * MIB, 16 * MIB):
            await vm.execute("block_resize", node_name="d0", size=size)
        return await make_bitmaps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "make_bitmaps", resized)
        with pytest.raises(Error, match="was made smaller while it was backed up") as refused:
            await backed_up(vm, place)
    assert refused.value.standing == "there is no backup"
    one, _ = await backed_up(vm, place)
    assert "was made smaller meanwhile" in one.reason
    await held(vm, place, one)


async def test_qemu_dies_in_the_first_one(begin, vm_dir, monkeypatch):
    """The image may have its bitmaps, which the next one removes: it knows the directory's id."""
    vm, place = await begin(QCOW2), vm_dir / "b"

    async def dies(*_):
        await vm.kill()
        raise DisconnectedError("QEMU has ended")

    with monkeypatch.context() as patch:
        patch.setattr(run, "digest_of", dies)
        with pytest.raises(DisconnectedError):
            await backed_up(vm, place)
    assert [path.suffix for path in place.iterdir()] == [".begun"]
    vm = await begin()
    one, result = await backed_up(vm, place)
    assert (one.kind, result.warnings) == ("full", ())
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    names = {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ())}
    assert all(name.startswith(one.bitmap) for name in names), names
    assert not list(place.glob("*.begun"))
    await held(vm, place, one)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_directory_in_which_nothing_can_be_removed(fails, begin, vm_dir, monkeypatch):
    """It has become read-only, say: how the backup ended is said even so."""
    vm, place = await begin(QCOW2), vm_dir / "b"

    remove = Directory.remove

    def refused(self, name, file):
        if str(self.path) == str(place):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)
        return remove(self, name, file)

    async def dead(*_):
        raise Error("the storage is dead")

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "remove", refused)
        if fails:
            patch.setattr(run, "digest_of", dead)
            with pytest.raises(Error, match="the storage is dead") as failed:
                await backed_up(vm, place)
            assert "there is no backup" in failed.value.standing
            assert left(place) in failed.value.standing
        else:
            _, result = await backed_up(vm, place)
            assert result.warnings == (left(place),)
    one, result = await backed_up(vm, place)
    assert (one.kind, result.warnings) == ("full" if fails else "incremental", ())
    assert not list(place.glob("*.begun"))
    await held(vm, place, one)


def left(place):
    why = os.strerror(errno.EROFS)
    return f"cannot remove what a backup left in {place}: {why}: the next backup does"


async def test_disks_in_turn_of_a_vm_that_nothing_tells(begin, vm_dir):
    """It has no UUID and no name: that a directory is its own all of its disks tell."""
    vm, place = await begin(TWO), vm_dir / "b"
    made = [await backed_up(vm, place, disk=name) for name in ("vd0", "vd1", "vd0", "vd1")]
    kinds = [one.kind for one, _ in made]
    assert kinds == ["full", "full", "incremental", "incremental"]


async def test_a_disk_that_has_grown(begin, vm_dir):
    vm, place = await begin(QCOW2), vm_dir / "b"
    await backed_up(vm, place)
    await vm.execute("block_resize", node_name="d0", size=24 * MIB)
    await vm.qemu_io("d0", "write -P 7 20M 64k")
    one, _ = await backed_up(vm, place)
    assert one.reason == "the disk has 25165824 bytes, and had 16777216 at the last backup"
    await held(vm, place, one)


async def test_a_snapshot_between_two(begin, vm_dir):
    """The bitmap goes on in the overlay, where it begins empty: it is not all there."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    first, _ = await backed_up(vm, place)
    await write(vm, 7)
    async with qmpblock.connect(vm.monitor_path) as controller:
        await controller.snapshot({await controller.disk("vd0"): vm_dir / "images" / "new.qcow2"})
    await vm.qemu_io("d0", "write -P 8 9M 64k")
    one, _ = await backed_up(vm, place)
    assert "another image lies below it since" in one.reason
    await vm.qemu_io("d0", "write -P 9 10M 64k")
    one, _ = await backed_up(vm, place)
    assert one.kind == "incremental"
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.commit():
            pass
    one, _ = await backed_up(vm, place)
    assert one.parent == first.file  # home again, the first bitmap has got all of it
    await held(vm, place, one)


async def test_somebody_elses_snapshot_between_two(begin, vm_dir):
    """QEMU's own takes no bitmap along, and the VM, which nothing tells, is known by what it had.

    An image that somebody committed while the VM was off has the first one, with all that came.
    """
    vm, place = await begin(QCOW2), vm_dir / "b"
    first, _ = await backed_up(vm, place)
    overlay = vm_dir / "images" / "new.qcow2"
    its = {"snapshot_file": str(overlay), "snapshot_node_name": "new"}
    await vm.execute("blockdev-snapshot-sync", node_name="d0", **its)
    await write(vm, 7)
    one, _ = await backed_up(vm, place)
    assert "a snapshot was taken since the last backup" in one.reason
    one, _ = await backed_up(vm, place)
    assert one.kind == "incremental"
    await vm.quit()
    code, out = await ran("qemu-img", "commit", "-f", "qcow2", overlay)
    assert code == 0, out
    vm = await begin()
    one, _ = await backed_up(vm, place)
    assert one.parent == first.file
    await held(vm, place, one)


@pytest.mark.needs_qemu(">= 10.0", reason="before, an overlay of ours would be below it")
async def test_somebody_elses_snapshot_meanwhile(begin, vm_dir, caplog):
    """It comes between the view and what that is of: the backup fails, and says by what.

    QEMU records our filter as a format (K45), of which one is told, and how to mend it.
    """
    vm, place = await begin(QCOW2), vm_dir / "b"
    overlay = vm_dir / "images" / "new.qcow2"

    async def disturbed():
        async with (
            qmpblock.connect(vm.monitor_path) as controller,
            controller.backup(place, await controller.disks(), speed=MIB) as job,
        ):
            [its] = [one for one in await vm.execute("query-block") if "inserted" in one]
            node = its["inserted"]["node-name"]
            names = {"snapshot_file": str(overlay), "snapshot_node_name": "new"}
            await vm.execute("blockdev-snapshot-sync", node_name=node, **names)
            with contextlib.suppress(CommandError):  # it may have failed of that by now
                await job.set_speed(0)

    with pytest.raises(JobError) as failed:
        await disturbed()
    assert "somebody else changed the chain of vd0 meanwhile" in failed.value.remedy
    [told] = [one.message for one in caplog.records if "copy-before-write" in one.message]
    one, _ = await backed_up(vm, place)
    assert one.source == str(overlay)
    found = await raw_of("qcow2", place / one.file)
    await vm.quit()
    code, out = await ran("qemu-img", "check", "-f", "qcow2", overlay)
    assert (code, "Unknown driver 'copy-before-wri'" in out) == (1, True)
    code, out = await ran(*shlex.split(told.partition(" run: ")[2]))
    assert code == 0, out
    assert found == await raw_of("qcow2", overlay)


async def test_what_qemu_records_of_a_filter_by_itself(begin, vm_dir):
    vm, overlay = await begin(QCOW2), vm_dir / "images" / "new.qcow2"
    await vm.execute("object-add", qom_type="throttle-group", id="g")
    group = {"driver": "throttle", "throttle_group": "g", "file": "d0"}
    await vm.execute("blockdev-add", node_name="filter", **group)
    names = {"snapshot_file": str(overlay), "snapshot_node_name": "new"}
    await vm.execute("blockdev-snapshot-sync", node_name="filter", **names)
    code, out = await ran("qemu-img", "info", "-U", "-f", "qcow2", overlay)
    assert code == 0, out
    assert "backing file format: throttle" in out


async def test_an_internal_snapshot_is_not_gone_back_to(begin, vm_dir):
    """The bitmap would know nothing of it. QEMU refuses that by itself."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    await vm.hmp("savevm before")
    await backed_up(vm, place)
    assert "active dirty bitmaps" in await vm.hmp("loadvm before")
    await vm.quit()
    image = vm_dir / "images" / "d0-0.qcow2"
    code, out = await ran("qemu-img", "snapshot", "-a", "before", image)
    assert (code, "active dirty bitmaps" in out) == (1, True)


async def test_an_internal_snapshot_is_gone_back_to_by_half(begin, vm_dir):
    """Where some disks alone have dirty bitmaps (K44): so that is warned of."""
    vm, place = await begin(QCOW2S), vm_dir / "b"
    await vm.hmp("savevm before")
    for number in (0, 1):
        await vm.qemu_io(f"d{number}", "write -P 7 0 64k")
    _, result = await backed_up(vm, place, disk="vd1")
    [warning] = result.warnings
    assert "loadvm would put vd0 back, then fail at the dirty bitmaps of vd1" in warning
    assert "Device has active dirty bitmaps" in await vm.hmp("loadvm before")
    assert (await vm.execute("query-status"))["status"] == "restore-vm"
    with pytest.raises(UnsupportedError, match="loadvm that failed") as refused:
        await backed_up(vm, place, disk="vd1")
    assert "memory" in refused.value.remedy
    await vm.quit()
    data = [await raw_of("qcow2", vm_dir / "images" / f"d{n}-0.qcow2") for n in (0, 1)]
    assert [one[:4] for one in data] == [b"\0" * 4, b"\7" * 4]
    vm = await begin()
    async with (
        qmpblock.connect(vm.monitor_path) as controller,
        controller.backup(place, await controller.disks()) as job,
    ):
        pass
    assert job.result.warnings == ()


async def test_an_image_that_was_put_back(begin, vm_dir):
    """Its bitmap is of the backup before the last, and so is nothing that the last one wrote."""
    vm, place = await begin(QCOW2), vm_dir / "b"
    first, _ = await backed_up(vm, place)
    await vm.quit()
    image = vm_dir / "images" / "d0-0.qcow2"
    old = image.read_bytes()
    vm = await begin()
    await write(vm, 7)
    await backed_up(vm, place)
    await vm.quit()
    image.write_bytes(old)
    vm = await begin()
    await vm.qemu_io("d0", "write -P 8 9M 64k")
    one, result = await backed_up(vm, place)
    assert (one.parent, result.warnings) == (first.file, ())  # of which it is an increment
    await held(vm, place, one)


async def test_a_data_file_that_was_put_back(begin, vm_dir):
    """No bitmap, in the image beside, would tell of it: so none outlives QEMU."""
    vm, place = await begin(DATA_FILE), vm_dir / "b"
    file = vm_dir / "images" / "d0.data"
    old = file.read_bytes()
    await write(vm, 7)
    one, _ = await backed_up(vm, place)
    assert (one.kind, one.persistent) == ("full", False)
    one, _ = await backed_up(vm, place)
    assert one.kind == "incremental"
    await vm.quit()
    file.write_bytes(old)
    vm = await begin()
    one, result = await backed_up(vm, place)
    assert "QEMU was started anew" in one.reason
    assert len(result.warnings) == 1
    await held(vm, place, one)


async def test_what_it_would_lie_on(begin, vm_dir):
    vm, place = await begin(QCOW2), vm_dir / "b"
    first, _ = await backed_up(vm, place)
    file = place / first.file
    os.utime(file)  # copied, say: it is read, and is what it was
    one, _ = await backed_up(vm, place)
    assert one.parent == first.file
    state = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"?")
    one, _ = await backed_up(vm, place)
    assert one.reason == f"of what it would lie on, {first.file} holds something else than it did"
    file.rename(place.parent / "away")
    one, _ = await backed_up(vm, place)
    assert one.kind == "incremental"  # on the one that is full since
    os.utime(place.parent / "away", ns=(state.st_atime_ns, state.st_mtime_ns))
    (place / one.parent).unlink()
    with pytest.raises(RequestError, match="is gone"):
        await backed_up(vm, place, kind="incremental")
    one, _ = await backed_up(vm, place)
    assert "is gone" in one.reason
    await held(vm, place, one)


async def test_a_refusal_touches_nothing(begin, vm_dir):
    vm, place = await begin(QCOW2), vm_dir / "b"
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()

        async def refused(where, error, said, **options):
            with pytest.raises(error, match=said) as caught:
                async with controller.backup(where, disks, **options):
                    pass
            assert caught.value.standing == "nothing was touched"

        await refused(place, RequestError, "no backup of this disk yet", kind="incremental")
        await refused(vm_dir / "images", RequestError, "holds no backups, but other things")
        assert {one.name for one in (vm_dir / "images").iterdir()} == {"d0-0.qcow2"}
        await refused(vm_dir / "no" / "b", RequestError, "cannot open the directory")
        assert not place.exists()
        await vm.execute("blockdev-add", driver="null-co", node_name="n", size=16 * MIB)
        await vm.execute("blockdev-mirror", device="d0", target="n", sync="full", job_id="j")
        await refused(place, (BusyError, UnsupportedError), "job")
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    assert [b for node in nodes for b in node.get("dirty-bitmaps", ()) if "name" in b] == []
    assert not place.exists()
