"""What lies below a disk's own image, changed while no bitmap sees it: the next backup is right.

The chain is what the headers say, as QEMU opens one that it is given by the name of its active
image alone.
"""

import asyncio
import contextlib
import json
import os

import pytest
from chains import cli
from fleecing import MIB, ran
from loopdevices import loop

import qmpblock
from qmpblock.errors import CommandError, RequestError

pytestmark = pytest.mark.live

SIZE = 8 * MIB


class Images:
    """The images of a disk, and the VMs that are started on it, one after the other."""

    def __init__(self, start, directory, place):
        self.start, self.directory, self.place = start, directory, place
        self.vm = None
        self.extra = ["-name", "web"]

    async def img(self, *words):
        code, out = await ran("qemu-img", *words)
        assert code == 0, out

    async def make(self, name, *, on=None, fmt="qcow2", fill=None, options=(), size=SIZE):
        """Make an image; `on`: its backing image and the format of that."""
        path = self.directory / name
        given = () if on is None else ("-b", on[0], "-F", on[1])
        sized = (size,) if on is None else ()
        await self.img("create", "-q", "-f", fmt, *options, *given, path, *map(str, sized))
        if fill is not None:
            await self.write(path, fill, fmt)
        return path

    async def write(self, path, fill, fmt="qcow2"):
        """Write to an image that no VM has open."""
        code, out = await ran("qemu-io", "-f", fmt, "-c", f"write -P {fill} 0 2M", path)
        assert code == 0, out

    async def chain(self, base="qcow2"):
        await self.make(f"base.{base}", fmt=base, fill=1)
        await self.make("middle.qcow2", on=(f"base.{base}", base))
        return await self.make("top.qcow2", on=("middle.qcow2", "qcow2"))

    async def begin(self, top="top.qcow2", **below):
        """Start the VM on an image, or anew; `below`: how its backing image is opened."""
        if self.vm is not None:
            await self.vm.quit()
        self.top = self.directory / top
        file = {"driver": "file", "filename": str(self.top)}
        disk = {"driver": "qcow2", "node-name": "d0", "file": file}
        nodes = [disk | {"backing": "below"}] if below else [disk]
        if below:
            nodes.insert(0, {"driver": "qcow2", "node-name": "below", **below})
        given = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
        device = {"driver": "virtio-blk-pci", "drive": "d0", "id": "vd0"}
        self.vm = await self.start([], extra=[*given, "-device", json.dumps(device), *self.extra])
        return self.vm

    async def backup(self, **options):
        """Back it up, as a look before says; return what the point file says of it."""
        async with qmpblock.connect(self.vm.monitor_path) as controller:
            disks = [await controller.disk("vd0")]
            [planned] = (await controller.plan_backup(self.place, disks, **options)).disks
            async with controller.backup(self.place, disks, **options) as job:
                pass
        [one] = job.result.point.disks
        assert (planned.kind, planned.reason) == (one.kind, one.reason)
        if one.reason and job.result.point.number > 1:
            assert job.result.warnings == (f"the backup of vd0 is full: {one.reason}",)
        return one

    async def other(self, byte=9):
        """Have the guest write something that the base knows nothing of."""
        device = "/machine/peripheral/vd0/virtio-backend"
        said = await self.vm.hmp(f'qemu-io -d {device} "write -P {byte} 4M 64k"')
        assert said == "", said

    async def check(self, one):
        """See that a backup holds what the disk does; the VM ends for that."""
        await self.vm.quit()
        self.vm = None
        names = ("-f", "qcow2", "-F", "qcow2", self.top, self.place / one.file)
        code, out = await ran("qemu-img", "compare", *names)
        assert code == 0, out


@pytest.fixture
def images(start_qemu, vm_dir, invariant):
    async def start(*arguments, **options):
        vm = await start_qemu(*arguments, **options)
        invariant.forget(vm)  # bitmaps stay, and images change
        return vm

    directory = vm_dir / "images"
    directory.mkdir()
    return Images(start, directory, vm_dir / "b")


async def off(images, change):
    """Change something while the VM is off, between two backups; return what the second is."""
    await images.chain()
    await images.begin()
    await images.backup()
    await images.other()
    await images.vm.quit()
    images.vm = None
    top = await change(images)
    await images.begin(top or "top.qcow2")
    await images.other(8)
    return await images.backup()


async def _replace(images):
    await images.make("new.qcow2", fill=5)
    (images.directory / "new.qcow2").rename(images.directory / "base.qcow2")


async def _copy_over(images):
    """In its place, with its length and its time."""
    base, new = images.directory / "base.qcow2", await images.make("new.qcow2", fill=5)
    was = base.stat()
    assert new.stat().st_size == was.st_size
    os.utime(new, ns=(was.st_atime_ns, was.st_mtime_ns))
    new.rename(base)


async def _write(images):
    await images.write(images.directory / "base.qcow2", 5)


async def _commit(images):
    await images.img("commit", "-q", "-f", "qcow2", images.directory / "top.qcow2")


async def _commit_middle(images):
    """What is seen is the same; nobody knows."""
    middle = images.directory / "middle.qcow2"
    await images.write(middle, 5)
    await images.img("commit", "-q", "-f", "qcow2", middle)


async def _rebase_blindly(images):
    await images.make("new.qcow2", fill=5)
    words = ("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "new.qcow2")
    await images.img(*words, images.directory / "top.qcow2")


async def _rebase_to_none(images):
    await images.img("rebase", "-u", "-f", "qcow2", "-b", "", images.directory / "middle.qcow2")


async def _rebase(images):
    words = ("rebase", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2")
    await images.img(*words, images.directory / "top.qcow2")


async def _snapshot(images):
    """The guest's image is below another one: there the bitmaps are not."""
    await images.make("over.qcow2", on=("top.qcow2", "qcow2"))
    return "over.qcow2"


async def _touch(images):
    os.utime(images.directory / "base.qcow2")


CHANGES = {
    _replace: "base.qcow2 is another file than it was at the last backup",
    _copy_over: "base.qcow2 is another file than it was at the last backup",
    _write: "the backing image {}/base.qcow2 was changed since the last backup",
    _commit: "the backing image {}/middle.qcow2 was changed since the last backup",
    _commit_middle: "middle.qcow2 was changed since the last backup",
    _rebase_blindly: "the disk lies on {0}/new.qcow2 now, and lay on {0}/middle.qcow2 on "
    "{0}/base.qcow2 at the last backup",
    _rebase_to_none: "the disk lies on {0}/middle.qcow2 now, and lay on {0}/middle.qcow2 on "
    "{0}/base.qcow2 at the last backup",
    _rebase: "the disk lies on {0}/base.qcow2 now",
    _snapshot: "a snapshot was taken since the last backup",
    _touch: "base.qcow2 was changed since the last backup",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
async def test_changed_while_the_vm_was_off(change, images):
    """The next one is full, and says why; what is there then is noted for the one after it."""
    one = await off(images, change)
    assert one.kind == "full"
    assert CHANGES[change].format(images.directory) in one.reason
    await images.other(7)
    one = await images.backup()
    assert (one.kind, one.reason) == ("incremental", "")
    await images.begin(images.top.name)
    await images.other(6)
    one = await images.backup()
    assert one.kind == "incremental"
    await images.check(one)


async def test_an_increment_that_is_asked_for_is_refused(images):
    await images.chain()
    await images.begin()
    await images.backup()
    await images.vm.quit()
    await _write(images)
    await images.begin()
    with pytest.raises(RequestError, match="cannot be incremental: the backing image"):
        await images.backup(kind="incremental")
    dry = await cli("backup", images.vm.monitor_path, images.place, "--dry-run")
    assert dry[0] == 4
    assert "would be full: the backing image" in dry[2]


async def test_images_that_nobody_changed(images):
    """Their directory was renamed, the VM started anew twice: what lies below is what it was."""
    await images.chain()
    await images.begin()
    await images.backup()
    await images.begin()
    await images.other(3)
    assert (await images.backup()).kind == "incremental"
    await images.vm.quit()
    images.vm = None
    away = images.directory.parent / "elsewhere"
    images.directory = images.directory.rename(away)
    await images.begin()
    await images.other(4)
    one = await images.backup()
    assert one.kind == "incremental"
    await images.check(one)


@pytest.mark.parametrize("whose", ["ours", "qemu's"])
async def test_a_snapshot_and_all_of_its_images_are_what_they_were(whose, images):
    """The image that was the active one has bitmaps, and is not written to any more."""
    await images.chain()
    vm = await images.begin()
    await images.backup()
    await images.other(3)
    overlay = images.directory / "over.qcow2"
    if whose == "ours":
        async with qmpblock.connect(vm.monitor_path) as controller:
            await controller.snapshot({await controller.disk("vd0"): overlay})
    else:
        its = {"snapshot_file": str(overlay), "snapshot_node_name": "d1"}
        await vm.execute("blockdev-snapshot-sync", node_name="d0", **its)
    await images.other(4)
    assert (await images.backup()).kind == "full"
    for byte in (5, 6):
        await images.begin("over.qcow2")
        await images.other(byte)
        one = await images.backup()
        assert (one.kind, one.reason) == ("incremental", "")
    await images.check(one)


async def test_a_chain_that_qemu_shortened_itself(images):
    """While it had the disk open: the guest saw nothing of it; and the one after is, too."""
    await images.chain()
    vm = await images.begin()
    await images.backup()
    await images.other(3)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.commit(top="@1", base="@2"):
            pass
    one = await images.backup()
    assert (one.kind, one.reason) == ("incremental", "")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.stream():
            pass
    await images.other(4)
    one = await images.backup()
    assert (one.kind, one.reason) == ("incremental", "")
    await images.begin()
    await images.other(5)
    one = await images.backup()
    assert (one.kind, one.reason) == ("incremental", "")
    await images.check(one)


async def test_a_chain_that_was_shortened_before_the_vm_was_off(images):
    """Nothing tells that what lies below has not been changed, too."""
    await images.chain()
    vm = await images.begin()
    await images.backup()
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.commit(top="@1", base="@2"):
            pass
    await images.begin()
    one = await images.backup()
    assert "base.qcow2 now, and lay on" in one.reason
    await images.check(one)


@pytest.mark.needs_qemu(">= 10.0", reason="before, no backup is made of what has no name")
async def test_replaced_while_the_vm_was_on(images):
    """It goes on with the file that it has open, until it is started anew."""
    await images.chain()
    await images.begin()
    await images.backup()
    await _replace(images)
    await images.other(3)
    assert (await images.backup()).kind == "incremental"
    await images.other(4)
    assert (await images.backup()).kind == "incremental"
    await images.begin()
    one = await images.backup()
    assert "base.qcow2 had been replaced, renamed or removed when the last backup" in one.reason
    await images.check(one)


async def test_written_to_while_the_vm_was_on(images):
    """By who heeds no lock of QEMU's, as whoever mounts a raw image."""
    await images.make("base.raw", fmt="raw", fill=1)
    await images.make("top.qcow2", on=("base.raw", "raw"))
    await images.begin()
    await images.backup()
    with (images.directory / "base.raw").open("r+b") as file:
        file.write(b"?" * 512)
    one = await images.backup()
    assert "base.raw was changed since the last backup" in one.reason
    await images.check(one)


async def test_a_link_that_leads_to_another_image(images):
    await images.make("v1.qcow2", fill=1)
    await images.make("v2.qcow2", fill=2)
    link = images.directory / "base.qcow2"
    link.symlink_to("v1.qcow2")
    await images.make("top.qcow2", on=("base.qcow2", "qcow2"))
    await images.begin()
    await images.backup()
    await images.begin()
    assert (await images.backup()).kind == "incremental"
    await images.vm.quit()
    link.unlink()
    link.symlink_to("v2.qcow2")
    await images.begin()
    one = await images.backup()
    assert "base.qcow2 is another file than it was" in one.reason
    await images.check(one)


@pytest.mark.parametrize("what", ["data file", "extent"])
async def test_a_part_of_a_lower_image(what, images):
    """Its own file is what it was; what holds its data is not."""
    if what == "data file":
        options = ("-o", f"data_file={images.directory / 'base.data'},data_file_raw=on")
        base, fmt, part = "base.qcow2", "qcow2", "base.data"
    else:
        options, base, fmt = ("-o", "subformat=monolithicFlat"), "base.vmdk", "vmdk"
        part = "base-flat.vmdk"
    await images.make(base, fmt=fmt, options=options, fill=1)
    await images.make("top.qcow2", on=(base, fmt))
    await images.begin()
    await images.backup()
    await images.begin()
    assert (await images.backup()).kind == "incremental"
    await images.vm.quit()
    with (images.directory / part).open("r+b") as file:
        file.write(b"?" * 512)
    await images.begin()
    one = await images.backup()
    assert f"{part} was changed since the last backup" in one.reason
    await images.check(one)


async def test_a_disk_that_was_closed_while_the_vm_was_on(images):
    """As one that is unplugged and plugged in again: it is as if the VM had been off."""
    await images.chain()
    vm = await images.begin()
    await images.backup()
    await images.other(3)
    await vm.execute("device_del", id="vd0")
    await vm.execute("system_reset")  # no guest runs that would let it go
    async with asyncio.timeout(30):
        while not await _closed(vm):
            await asyncio.sleep(0.05)
    await _rebase_blindly(images)
    file = {"driver": "file", "filename": str(images.top)}
    await vm.execute("blockdev-add", driver="qcow2", node_name="d0", file=file)
    await vm.execute("device_add", driver="virtio-blk-pci", drive="d0", id="vd0")
    one = await images.backup()
    assert "the disk lies on" in one.reason
    await images.check(one)


async def _closed(vm):
    with contextlib.suppress(CommandError):  # it is in use as long as the device is there
        await vm.execute("blockdev-del", node_name="d0")
        return True
    return False


@pytest.mark.parametrize("bitmap", [False, True], ids=["bare", "with-a-bitmap"])
async def test_a_base_that_is_opened_for_writing(bitmap, images):
    """QEMU writes to it by itself where it has bitmaps: nobody can tell that from a change."""
    base = await images.make("base.qcow2", fill=1)
    if bitmap:
        await images.img("bitmap", "--add", base, "its")
    await images.make("top.qcow2", on=("base.qcow2", "qcow2"))
    below = {"file": {"driver": "file", "filename": str(base)}}
    await images.begin(**below)
    await images.backup()
    await images.begin(**below)
    await images.other(3)
    one = await images.backup()
    assert one.kind == ("full" if bitmap else "incremental")
    assert ("base.qcow2 was changed" in one.reason) is bitmap
    for byte in (4, 5):
        await images.begin(**below, **{"read-only": True})
        await images.other(byte)
        one = await images.backup()
    assert one.kind == "incremental"
    await images.check(one)


async def test_a_base_on_a_device(images):
    """Nothing tells whether it is written to; that it is another one is not seen, either."""
    await images.make("base.raw", fmt="raw", fill=1)
    with loop(images.directory / "base.raw") as device:
        await images.make("top.qcow2", on=(device, "raw"))
        await images.begin()
        one = await images.backup()
        assert [file.told for file in one.lower] == ["unseen"]
        await images.begin()
        await images.other(3)
        one = await images.backup()
        assert one.kind == "incremental"
        await images.check(one)


async def test_a_link_that_leads_to_what_another_disk_lies_on(images):
    """While the VM is on, and has both open: the name leads to a file that it has open, too."""
    for number in (1, 2):
        await images.make(f"v{number}.qcow2", fill=number)
    link = images.directory / "golden.qcow2"
    link.symlink_to("v1.qcow2")
    await images.make("top.qcow2", on=("golden.qcow2", "qcow2"))
    other = await images.make("other.qcow2", on=("v2.qcow2", "qcow2"))
    file = {"driver": "file", "filename": str(other)}
    second = {"driver": "virtio-blk-pci", "drive": "d1", "id": "vd1"}
    node = {"driver": "qcow2", "node-name": "d1", "file": file}
    images.extra = ["-blockdev", json.dumps(node), "-device", json.dumps(second)]
    await images.begin()
    await images.backup()
    link.unlink()
    link.symlink_to("v2.qcow2")
    one = await images.backup()
    assert (one.kind, [file.told for file in one.lower]) == ("incremental", ["elsewhere"])
    await images.begin()
    one = await images.backup()
    assert "golden.qcow2 had been replaced" in one.reason
    await images.check(one)


async def test_a_disk_that_has_gone_over_to_a_copy(images):
    """Over the same backing image: what was noted of the old chain is of no use, nor used."""
    await images.chain()
    vm = await images.begin()
    await images.backup()
    copied = images.directory / "copy.qcow2"
    code, _, err = await cli("copy", vm.monitor_path, "vd0", copied, "--pivot", "--layers", "top")
    assert (code, "stays with" in err) == (4, True)
    await images.other(3)
    assert (await images.backup()).kind == "full"
    await images.other(4)
    assert (await images.backup()).kind == "incremental"
    await images.begin(copied.name)
    await images.other(5)
    one = await images.backup()
    assert (one.kind, [file.told for file in one.lower]) == ("incremental", ["seen", "seen"])
    await images.check(one)


@pytest.mark.parametrize("name", ["file", "./a:b/base.qcow2", "json"])
async def test_names_of_a_base(name, images):
    """However a header names it, it is the file that QEMU has open."""
    base = await images.make("base.qcow2", fill=1)
    if name.startswith("./"):
        (images.directory / "a:b").mkdir()
        base = base.rename(images.directory / name)
    if name == "file":
        name = f"file:{base}"
    if name == "json":
        file = {"driver": "file", "filename": str(base), "locking": "off"}
        name = "json:" + json.dumps({"driver": "qcow2", "file": file})
    await images.make("top.qcow2", on=(name, "qcow2"))
    await images.begin()
    one = await images.backup()
    assert [file.told for file in one.lower] == ["seen"]
    await images.begin()
    assert (await images.backup()).kind == "incremental"
    await images.vm.quit()
    images.vm = None
    await images.write(base, 5)
    await images.begin()
    one = await images.backup()
    assert "base.qcow2 was changed since the last backup" in one.reason
    await images.check(one)
