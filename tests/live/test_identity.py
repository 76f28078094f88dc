"""Which file an image is: what QEMU has open, whatever its name and wherever QEMU lives.

Each of these was refused as "not on this host", or recorded a name that led elsewhere.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chains import cli
from disturbed import until

import qmpblock
from qmpblock.errors import Error
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

MIB = 1 << 20
SIZE = 16 * MIB


class Images:
    """Images of one test, made and looked at by qemu-img."""

    def __init__(self, directory, qemu_binary):
        self.directory = directory
        self.tools = Tools.of(qemu_binary)

    async def img(self, *words):
        return await self.tools.run(self.tools.img, *map(str, words))

    async def make(self, name, *pattern, backing=None, fmt="qcow2", size=SIZE, options=()):
        """Make an image, and write patterns (value, offset, length) to it."""
        path = self.directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        below = ("-b", backing, "-F", "qcow2") if backing else ()
        named = ("-o", ",".join(options)) if options else ()
        await self.img("create", "-q", "-f", fmt, *below, *named, path, size)
        await self.write(path, *pattern, fmt=fmt)
        return path

    async def write(self, path, *pattern, fmt="qcow2"):
        for value, offset, length in pattern:
            command = f"write -P {value} {offset} {length}"
            await self.tools.run(self.tools.io, "-f", fmt, "-c", command, str(path))

    async def content(self, image, fmt="qcow2"):
        """Read all that an image shows, as whoever opens it by its name and headers does."""
        raw = self.directory / "content.raw"
        await self.img("convert", "-f", fmt, "-O", "raw", image, raw)
        data = raw.read_bytes()
        raw.unlink()
        return data

    async def backing(self, image, fmt="qcow2"):
        return json.loads(await self.img("info", "-f", fmt, "--output=json", "-U", image)).get(
            "backing-filename"
        )


@pytest.fixture
def images(vm_dir, qemu_binary):
    return Images(vm_dir, qemu_binary)


def disk(filename, *, node="d0", fmt="qcow2", driver="file", more="", extra=""):
    """Return the command line words of one disk."""
    return [
        "-blockdev",
        f"driver={driver},node-name={node}-file,filename={filename},discard=unmap{extra}",
        *("-blockdev", f"driver={fmt},node-name={node},file={node}-file,discard=unmap{more}"),
        *("-device", f"virtio-blk-pci,drive={node},id=v{node}"),
    ]


def wrapped(vm_dir, qemu_binary, *, before="", command=""):
    """Return a program that starts QEMU after some shell commands, through another program."""
    program = vm_dir / "started"
    program.write_text(f'#!/bin/sh\nset -e\n{before}\nexec {command} {qemu_binary} "$@"\n')
    program.chmod(0o755)
    return str(program)


@contextlib.contextmanager
def loop_device(file):
    """Have a file be a block device, if this machine allows it."""
    found = subprocess.run(
        ["losetup", "--show", "-f", str(file)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"no loop device can be had here: {found.stderr.strip()}")
    try:
        yield found.stdout.strip()
    finally:
        subprocess.run(["losetup", "-d", found.stdout.strip()], check=False)


async def guest(vm, command, disk="vd0"):
    """Do I/O as the guest would."""
    await vm.qemu_io_at(f"/machine/peripheral/{disk}/virtio-backend", command)


# where QEMU and its images are

PLACES = ["file-link", "directory-link", "relative", "relative-link", "own-mounts", "two-tails"]


async def start_in(place, image, start_qemu, vm_dir, qemu_binary):
    """Start a QEMU with one image so that it is not simply there under its name."""
    qemu, name, more = qemu_binary, str(image), []
    links = vm_dir / "links"
    links.mkdir()
    if place == "file-link":
        (links / "disk.qcow2").symlink_to(image)
        name = str(links / "disk.qcow2")
    elif place == "directory-link":
        (links / "dir").symlink_to(image.parent)
        name = str(links / "dir" / image.name)
    elif place == "relative":
        qemu, name = wrapped(vm_dir, qemu_binary, before=f"cd {image.parent}"), image.name
    elif place == "relative-link":
        (links / "disk.qcow2").symlink_to(os.path.relpath(image, links))
        qemu, name = wrapped(vm_dir, qemu_binary, before=f"cd {vm_dir}"), "links/disk.qcow2"
    elif place == "own-mounts":
        if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
            pytest.skip("no mount namespace can be had here")
        qemu = wrapped(vm_dir, qemu_binary, command="unshare -m")
    elif place == "two-tails":
        other = links / image.name
        shutil.copyfile(image, other)
        more = disk(other, node="d1")
    return await start_qemu([], qemu=qemu, extra=[*disk(name), *more])


@pytest.mark.parametrize("place", PLACES)
async def test_an_image_that_is_on_this_host_is_found(
    place, images, start_qemu, invariant, vm_dir, qemu_binary
):
    """Full allocation needs the file, its file system, and a place beside it."""
    image = await images.make("store/disk.qcow2", (7, MIB, MIB))
    before = await images.content(image)
    vm = await start_in(place, image, start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    code, out, err = await cli("allocate", vm.monitor_path, "vd0", "--full", "--json")
    assert code == 0, err
    assert json.loads(out)["reserved"] >= SIZE - 2 * MIB
    overlay = vm_dir / "over.qcow2"
    code, out, err = await cli("snapshot", vm.monitor_path, f"vd0={overlay}", "--json")
    assert code == 0, err
    await guest(vm, f"write -P 9 {8 * MIB} {MIB}")
    await vm.quit()
    after = bytearray(before)
    after[8 * MIB : 9 * MIB] = b"\x09" * MIB
    assert await images.content(overlay) == after
    assert image.stat().st_blocks * 512 >= SIZE - MIB
    assert not list(vm_dir.rglob("*qmpblock-*"))


async def test_an_overlay_of_ours_lies_beside_the_real_file(
    images, start_qemu, invariant, vm_dir, qemu_binary
):
    """Where `recover IMAGE` looks for it after a crash, by whatever name it is called."""
    image = await images.make("store/disk.qcow2", (7, MIB, MIB))
    vm = await start_in("file-link", image, start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    seen = set()
    async with qmpblock.connect(vm.monitor_path) as controller:
        subject = await controller.disk("vd0")
        real = controller.monitor._execute

        async def execute(name, arguments):
            if name == "blockdev-reopen":
                seen.update(path.parent for path in vm_dir.rglob("*.qmpblock-*"))
            return await real(name, arguments)

        controller.monitor._execute = execute
        await subject.allocate(8 * MIB, MIB, full=True)
    assert seen == {image.parent}


@contextlib.asynccontextmanager
async def left_its_directory(vm_dir, qemu_binary, *disks):
    """Start a VM that does; yields its monitor."""
    monitor, pidfile = vm_dir / "qmp", vm_dir / "pid"
    (vm_dir / "idle.rom").touch()
    command = [qemu_binary, "-nodefaults", "-no-user-config", "-display", "none", "-m", "16"]
    command += ["-machine", "pc,accel=tcg", "-daemonize", "-pidfile", str(pidfile)]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    command += disks
    started = await asyncio.create_subprocess_exec(
        *command, cwd=vm_dir, env={**os.environ, "PWD": "/"}, stdout=-3, stderr=-3
    )
    assert await started.wait() == 0
    pid = int(pidfile.read_text())
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        yield str(monitor)
    finally:
        os.kill(pid, 15)
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)


async def test_a_vm_that_left_its_directory(images, vm_dir, qemu_binary):
    """-daemonize goes to the root directory; what a relative name was, the descriptors tell."""
    image = await images.make("store/disk.qcow2", (7, MIB, MIB))
    other = await images.make("other/disk.qcow2", (8, MIB, MIB))
    disks = (*disk("store/disk.qcow2"), *disk(other, node="d1"))
    async with left_its_directory(vm_dir, qemu_binary, *disks) as monitor:
        code, _, err = await cli("allocate", monitor, "vd0", "--full")
        assert code == 0, err
        overlay = vm_dir / "over.qcow2"
        code, _, err = await cli("snapshot", monitor, f"vd0={overlay}")
        assert code == 0, err
    assert image.stat().st_blocks * 512 >= SIZE - MIB
    assert await images.backing(overlay) == "store/disk.qcow2"
    assert await images.content(overlay) == await images.content(image)


async def test_bitmaps_of_an_image_that_cannot_be_opened_anew(images, vm_dir, qemu_binary):
    """K42: it is not frozen; one that somebody else has frozen, the guest does not go over to."""
    image = await images.make("store/disk.qcow2", (7, MIB, MIB))
    other = await images.make("other.qcow2", (8, MIB, MIB))
    await images.img("bitmap", "--add", image, "kept")
    file = "file.driver=file,file.filename=store/disk.qcow2"
    disks = ("-blockdev", f"qcow2,node-name=d0,{file}", "-device", "virtio-blk-pci,drive=d0,id=vd0")
    async with left_its_directory(vm_dir, qemu_binary, *disks) as monitor:
        for words in (
            ("allocate", monitor, "vd0", "--full"),
            ("snapshot", monitor, f"vd0={vm_dir}/over"),
        ):
            code, _, err = await cli(*words)
            assert code == 2, err
            assert "cannot be opened anew by QEMU" in err
        node = {"driver": "qcow2", "node-name": "over", "backing": None}
        async with qmpblock.connect(monitor) as vm:
            execute = vm.monitor.execute
            await execute(
                "blockdev-add", node | {"file": {"driver": "file", "filename": str(other)}}
            )
            await execute("blockdev-snapshot", {"node": "d0", "overlay": "over"})
            frozen = (await vm.graph()).nodes["d0"]
            assert (frozen.read_only, frozen.bitmaps[0].recording) == (False, True)
        code, _, err = await cli("commit", monitor, "vd0")
        assert code == 2, err
        assert "nothing can be written to store/disk.qcow2 any more" in err
        async with qmpblock.connect(monitor) as vm:  # as it would be without that
            job = {"job-id": "job", "device": "over", "auto-dismiss": False}
            await vm.monitor.execute("block-commit", job)
            said = await until(lambda: concluded(vm.monitor), "its end")
        assert said["error"] == "Operation not permitted"


async def concluded(monitor):
    [job] = await monitor.execute("query-jobs")
    return job if job["status"] == "concluded" else None


@pytest.mark.parametrize("link", [False, True])
async def test_an_image_on_a_block_device(link, images, start_qemu, invariant, vm_dir):
    file = vm_dir / "device"
    with file.open("wb") as made:
        made.truncate(2 * SIZE)
    with loop_device(file) as device:
        name = device
        await images.img("create", "-q", "-f", "qcow2", device, SIZE)
        await images.write(device, (7, MIB, MIB))
        before = await images.content(device)
        if link:
            (vm_dir / "volume").symlink_to(device)
            name = str(vm_dir / "volume")
        vm = await start_qemu([], extra=disk(name, driver="host_device"))
        invariant.forget(vm)
        code, _, err = await cli("allocate", vm.monitor_path, "vd0", "--full")
        assert code == 2
        assert "is a block device" in err
        assert "nothing was touched" in err
        overlay = vm_dir / "over.qcow2"
        code, out, err = await cli("snapshot", vm.monitor_path, f"vd0={overlay}", "--json")
        assert code == 0, err
        assert json.loads(out)["overlays"][0]["backing_name"] == name
        await guest(vm, f"write -P 9 {8 * MIB} {MIB}")
        await vm.quit()
        # As absolute as it is: it leads there from wherever the overlay is.
        moved = vm_dir / "somewhere" / "else"
        moved.mkdir(parents=True)
        overlay = overlay.rename(moved / overlay.name)
        after = bytearray(before)
        after[8 * MIB : 9 * MIB] = b"\x09" * MIB
        assert await images.content(overlay) == after


async def test_another_root_directory(images, start_qemu, invariant, vm_dir, qemu_binary):
    """What QEMU would open by a name is not what we would make there: it says so."""
    jail = vm_dir / "jail"
    jail.mkdir()
    image = await images.make("jail/disk.qcow2", (7, MIB, MIB))
    version = (await images.tools.run(qemu_binary, "--version")).split()[3]
    option = ["-chroot", str(jail)]
    if int(version.partition(".")[0]) >= 9:
        option = ["-run-with", f"chroot={jail}"]
    vm = await start_qemu([], extra=[*disk(image), *option])
    code, _, err = await cli("map", vm.monitor_path, "vd0", "--json", "--layers")
    assert code == 0, err
    for words in (
        ("allocate", vm.monitor_path, "vd0", "--full"),
        ("snapshot", vm.monitor_path, f"vd0={vm_dir / 'over.qcow2'}"),
    ):
        code, _, err = await cli(*words)
        assert code != 0
        if words[0] == "allocate":
            assert code == 2
            assert "is not there for the VM, which has mounts or a root directory" in err
    assert not (vm_dir / "over.qcow2").exists()


@pytest.mark.scenarios("chain-3.yaml")
async def test_over_tcp_it_says_that_it_cannot_tell(scenario, start_qemu, invariant, free_port):
    monitor = f"127.0.0.1:{free_port}"
    await start_qemu(scenario, extra=["-qmp", f"tcp:{monitor},server=on,wait=off"])
    code, _, err = await cli("allocate", monitor, "vd0", "--full", "--insecure")
    assert code == 2
    assert "reached over TCP" in err


# what is recorded


@pytest.mark.parametrize("links", [False, True], ids=["plain", "links"])
@pytest.mark.parametrize("operation", ["stream", "commit"])
async def test_a_moved_chain_opens(operation, links, images, start_qemu, invariant, vm_dir):
    """Relative stays relative, also where the layers lie in different directories."""
    await images.make("tree/low/base.qcow2", (1, MIB, MIB), (2, 2 * MIB, MIB))
    await images.make("tree/low/one.qcow2", (3, 2 * MIB, MIB), backing="base.qcow2")
    await images.make("tree/mid/two.qcow2", (4, 4 * MIB, MIB), backing="../low/one.qcow2")
    await images.make("tree/top/three.qcow2", (5, 6 * MIB, MIB), backing="../mid/two.qcow2")
    top = vm_dir / "tree" / "top" / "three.qcow2"
    before = await images.content(top)
    name = top
    if links:
        (vm_dir / "tree" / "a" / "b").mkdir(parents=True)
        (vm_dir / "tree" / "a" / "b" / "link").symlink_to("../../top")
        name = vm_dir / "tree" / "a" / "b" / "link" / top.name
    vm = await start_qemu([], extra=disk(name))
    invariant.forget(vm)
    if operation == "stream":
        words = ("stream", vm.monitor_path, "vd0", "--base", "@2")
    else:
        words = ("commit", vm.monitor_path, "vd0", "--top", "@1", "--base", "@2")
    code, _, err = await cli(*words)
    assert code == 0, err
    await vm.quit()
    assert await images.backing(top) == "../low/one.qcow2"
    (vm_dir / "tree").rename(vm_dir / "moved")
    assert await images.content(vm_dir / "moved" / "top" / "three.qcow2") == before


async def test_an_image_with_a_name_in_another_directory(images, start_qemu, invariant, vm_dir):
    """A relative name would count from either of the two directories: an absolute one leads."""
    await images.make("low/base.qcow2", (1, MIB, MIB))
    await images.make("low/one.qcow2", (3, 2 * MIB, MIB), backing="base.qcow2")
    await images.make("store/real.qcow2", (5, 6 * MIB, MIB))
    (vm_dir / "vms").mkdir()
    top = vm_dir / "vms" / "disk.qcow2"
    top.symlink_to("../store/real.qcow2")
    await images.img(
        "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "../low/one.qcow2", str(top)
    )
    before = await images.content(top)
    vm = await start_qemu([], extra=disk(top))
    invariant.forget(vm)
    code, _, err = await cli("stream", vm.monitor_path, "vd0", "--base", "@2")
    assert code == 0, err
    await vm.quit()
    assert await images.content(top) == before
    assert await images.content(vm_dir / "store" / "real.qcow2") == before


# what does not lead back by a plain name


async def refused(vm, words, *reasons, code=2):
    """Run a command that must be refused, with nothing touched."""
    before = await vm.execute("query-named-block-nodes", flat=True)
    found, _, err = await cli(*words)
    assert found == code, err
    assert "nothing was touched" in err
    for reason in reasons:
        assert reason in err
    after = await vm.execute("query-named-block-nodes", flat=True)
    assert [one["node-name"] for one in after] == [one["node-name"] for one in before]


PART = ",offset=1048576,size=4194304"


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_an_overlay_of_a_part_of_a_file(fmt, images, start_qemu, invariant, vm_dir):
    """Recorded as a plain name, the overlay would show the file's beginning."""
    whole = vm_dir / "whole.raw"
    inner = await images.make("inner", (7, MIB, MIB), fmt=fmt, size=4 * MIB)
    assert inner.stat().st_size <= 4 * MIB
    whole.write_bytes(b"\x01" * MIB + inner.read_bytes().ljust(4 * MIB, b"\0") + b"\x02" * MIB)
    before = await images.content(inner, fmt)
    words = ["-blockdev", f"driver=file,node-name=f,filename={whole}"]
    top = "slice"
    words += ["-blockdev", f"driver=raw,node-name=slice,file=f{PART}"]
    if fmt == "qcow2":
        top = "d0"
        words += ["-blockdev", "driver=qcow2,node-name=d0,file=slice"]
    words += ["-device", f"virtio-blk-pci,drive={top},id=vd0"]
    vm = await start_qemu([], extra=words)
    if fmt == "raw":
        await refused(vm, ("allocate", vm.monitor_path, "vd0", "--full"), "only a part")
    overlay, second = vm_dir / "over.qcow2", vm_dir / "second.qcow2"
    for file in (overlay, second):
        code, _, err = await cli("snapshot", vm.monitor_path, f"vd0={file}")
        assert code == 0, err
        await guest(vm, "write -P 9 3M 64K" if file == overlay else "write -P 8 2M 64K")
    invariant.forget(vm)
    code, _, err = await cli("stream", vm.monitor_path, "vd0", "--base", "@2")
    assert code == 0, err
    code, out, err = await cli("map", vm.monitor_path, "vd0", "--layers", "--json")
    assert code == 0, err
    await vm.quit()
    after = bytearray(before)
    after[3 * MIB : 3 * MIB + 65536] = b"\x09" * 65536
    assert await images.content(overlay) == after
    after[2 * MIB : 2 * MIB + 65536] = b"\x08" * 65536
    assert await images.content(second) == after
    code, out, err = await cli("map", str(second), "--json")
    assert code == 0, err
    printed = await images.img("map", "-f", "qcow2", "--output=json", second)
    kept = ("start", "length", "depth", "present", "zero", "data")
    assert json.loads(out) == merged(
        [{key: one[key] for key in kept} for one in json.loads(printed)]
    )
    # And in QEMU itself.
    vm = await start_qemu([], extra=disk(second))
    await guest(vm, "read -P 9 3M 64K")
    await guest(vm, "read -P 8 2M 64K")
    if fmt == "raw":
        await guest(vm, "read -P 7 1M 1M")


def merged(records):
    """Merge neighbours that differ in nothing but their place."""
    found = []
    for one in records:
        last = found[-1] if found else None
        if last and {**last, "start": 0, "length": 0} == {**one, "start": 0, "length": 0}:
            last["length"] += one["length"]
        else:
            found.append(dict(one))
    return found


@pytest.mark.parametrize("what", ["renamed", "replaced", "removed", "link", "data-file"])
async def test_an_image_that_is_not_under_its_name_any_more(
    what, images, start_qemu, invariant, vm_dir
):
    """At the next start QEMU would find another file, or none, without a word."""
    options = ("data_file=" + str(vm_dir / "data"),) if what == "data-file" else ()
    base = await images.make("store/base.qcow2", (1, MIB, MIB), options=options)
    top = await images.make("store/top.qcow2", (2, 2 * MIB, MIB), backing="base.qcow2")
    await images.make("store/other.qcow2", (6, 0, MIB))
    name = top
    if what == "link":
        name = vm_dir / "store" / "link.qcow2"
        name.symlink_to("top.qcow2")
    elif what == "data-file":
        name = base
    vm = await start_qemu([], extra=disk(name))
    saved = vm_dir / "store" / "saved"
    if what == "renamed":
        top.rename(saved)
    elif what == "replaced":
        os.link(top, saved)
        (vm_dir / "store" / "other.qcow2").replace(top)
    elif what == "removed":
        os.link(top, saved)
        top.unlink()
    elif what == "link":
        name.unlink()
        name.symlink_to("other.qcow2")
    else:
        (vm_dir / "data").rename(vm_dir / "moved")
        (vm_dir / "data").write_bytes(bytes(SIZE))
    overlay = vm_dir / "store" / "over.qcow2"
    words = ("snapshot", vm.monitor_path, f"vd0={overlay}")
    await refused(vm, words, "who starts the VM by that name")
    assert not overlay.exists()
    if what != "data-file":
        await refused(vm, ("allocate", vm.monitor_path, "vd0", "--full"))
    # Given back its name, it goes.
    if what == "link":
        name.unlink()
        name.symlink_to("top.qcow2")
    elif what == "data-file":
        (vm_dir / "moved").replace(vm_dir / "data")
    else:
        saved.replace(top)
    code, _, err = await cli(*words)
    assert code == 0, err
    invariant.forget(vm)
    await guest(vm, "write -P 9 8M 64K")
    await vm.quit()
    assert (await images.content(overlay))[8 * MIB] == 9


@pytest.mark.parametrize("operation", ["pivot", "commit", "stream"])
async def test_a_base_that_is_not_under_its_name_any_more(
    operation, images, start_qemu, invariant, vm_dir
):
    """A commit would end in a file that no name leads to, a stream record another one's name."""
    base = await images.make("base.qcow2", (1, MIB, MIB))
    await images.make("middle.qcow2", (2, 2 * MIB, MIB), backing="base.qcow2")
    top = await images.make("top.qcow2", (3, 3 * MIB, MIB), backing="middle.qcow2")
    third = await images.make("third.qcow2", backing="top.qcow2")
    before = await images.content(third)
    vm = await start_qemu([], extra=disk(third))
    os.link(base, vm_dir / "saved")
    base.write_bytes((vm_dir / "saved").read_bytes())  # the same file still
    base.unlink()
    base.write_bytes((vm_dir / "saved").read_bytes())  # another one of the same content
    words = {
        "pivot": ("commit", vm.monitor_path, "vd0"),
        "commit": ("commit", vm.monitor_path, "vd0", "--top", "@1", "--base", "@3"),
        "stream": ("stream", vm.monitor_path, "vd0", "--base", "@3"),
    }[operation]
    await refused(vm, words, "is another file now")
    (vm_dir / "saved").replace(base)
    assert top.exists()
    code, _, err = await cli(*words)
    assert code == 0, err
    invariant.forget(vm)
    await vm.quit()
    assert await images.content(base if operation == "pivot" else third) == before


async def test_descriptors_that_were_passed(images, start_qemu, invariant, vm_dir, qemu_binary):
    """/dev/fdset/N is no name for the next start; the file has one, which leads back."""
    image = await images.make("store/disk.qcow2", (7, MIB, MIB))
    qemu = wrapped(vm_dir, qemu_binary, before=f"exec 7<>{image}; exec 8<{image}")
    sets = ["-add-fd", "fd=7,set=3", "-add-fd", "fd=8,set=3"]
    vm = await start_qemu([], qemu=qemu, extra=[*sets, *disk("/dev/fdset/3")])
    invariant.forget(vm)
    code, _, err = await cli("allocate", vm.monitor_path, "vd0", "--full")
    assert code == 0, err
    overlay = vm_dir / "over.qcow2"
    code, _, err = await cli("snapshot", vm.monitor_path, f"vd0={overlay}")
    assert code == 0, err
    await guest(vm, "write -P 9 8M 64K")
    await vm.quit()
    assert await images.backing(overlay) == "store/disk.qcow2"
    content = await images.content(overlay)
    assert content[MIB : 2 * MIB] == b"\x07" * MIB
    assert content[8 * MIB] == 9
    assert image.stat().st_blocks * 512 >= SIZE - MIB


async def test_a_temporary_overlay(images, start_qemu, invariant, vm_dir):
    """-snapshot: the overlay has no name from the beginning, and ends with the VM."""
    image = await images.make("disk.qcow2", (7, MIB, MIB))
    words = ["-drive", f"if=none,id=d0,file={image},format=qcow2,snapshot=on,discard=unmap"]
    vm = await start_qemu([], extra=[*words, "-device", "virtio-blk-pci,drive=d0,id=vd0"])
    overlay = vm_dir / "over.qcow2"
    await refused(
        vm, ("snapshot", vm.monitor_path, f"vd0={overlay}"), "has been removed", "-snapshot"
    )
    await refused(vm, ("allocate", vm.monitor_path, "vd0", "--full"), "has been removed")
    assert not overlay.exists()


async def test_a_data_file_that_only_the_command_line_names(images, start_qemu, invariant, vm_dir):
    """The header names another; described in full, the image opens with the right one."""
    first, second = vm_dir / "first", vm_dir / "second"
    image = await images.make("disk.qcow2", (1, 0, MIB), options=(f"data_file={first}",))
    shutil.copyfile(first, second)
    with second.open("r+b") as file:
        file.write(b"\x05" * MIB)
    data = ["-blockdev", f"driver=file,node-name=data,filename={second}"]
    vm = await start_qemu([], extra=[*data, *disk(image, more=",data-file=data")])
    await guest(vm, "read -P 5 0 1M")
    overlay = vm_dir / "over.qcow2"
    code, _, err = await cli("snapshot", vm.monitor_path, f"vd0={overlay}")
    assert code == 0, err
    invariant.forget(vm)
    await vm.quit()
    assert (await images.content(overlay))[: 2 * MIB] == b"\x05" * MIB + bytes(MIB)


@pytest.mark.parametrize("operation", ["pivot", "stream"])
async def test_a_base_that_is_renamed_while_the_job_runs(
    operation, images, start_qemu, invariant, vm_dir
):
    """Seen before the job is finalized: the chain stays as it was."""
    base = await images.make("base.qcow2", (1, MIB, MIB))
    await images.make("middle.qcow2", (2, 2 * MIB, MIB), backing="base.qcow2")
    top = await images.make("top.qcow2", (3, 3 * MIB, MIB), backing="middle.qcow2")
    before = await images.content(top)
    vm = await start_qemu([], extra=disk(top))
    async with qmpblock.connect(vm.monitor_path) as controller:
        subject = await controller.disk("vd0")
        do = subject.commit if operation == "pivot" else subject.stream
        with pytest.raises(Error, match="who starts the VM by that name") as caught:
            async with do(base="@2"):
                base.rename(vm_dir / "moved")
        assert "the chain is as it was" in str(caught.value)
        await subject.refresh()
        assert len(subject.chain.layers) == 3
    invariant.forget(vm)  # the images hold what was copied by then
    await vm.quit()
    (vm_dir / "moved").rename(base)
    assert await images.content(top) == before


# one file, open twice

WAYS = ["same-name", "hard-link", "link", "relative", "json"]


def unlocked(file, below=None, **more):
    """Describe an image whose file is opened without locks."""
    place = {"driver": "file", "filename": str(file), "locking": "off", **more}
    found = {"driver": "qcow2", "file": place}
    return found | ({"backing": below} if below else {})


def device(described, node):
    words = ["-blockdev", json.dumps({**described, "node-name": node})]
    return [*words, "-device", f"virtio-blk-pci,drive={node},id=v{node}"]


@pytest.mark.parametrize("operation", ["pivot", "commit", "stream"])
@pytest.mark.parametrize("way", WAYS)
async def test_two_disks_over_one_file_that_is_open_twice(
    way, operation, images, start_qemu, invariant, vm_dir, qemu_binary
):
    """Without locks QEMU knows nothing of it: what goes into the one changes the other."""
    base = await images.make("base.qcow2", (1, MIB, MIB))
    middle = await images.make("middle.qcow2", (2, 2 * MIB, MIB), backing=base)
    one = await images.make("one.qcow2", (3, 3 * MIB, MIB), backing=middle)
    top = await images.make("top.qcow2", backing=one)
    shared = middle if operation == "stream" else base
    second = await images.make("second.qcow2", (4, 4 * MIB, MIB), backing=shared)
    other, more = shared, {}
    if way == "hard-link":
        other = vm_dir / "hard.qcow2"
        os.link(shared, other)
    elif way == "link":
        other = vm_dir / "link.qcow2"
        other.symlink_to(shared.name)
    elif way == "relative":
        other = shared.name
    elif way == "json":
        more = {"cache": {"direct": False}, "aio": "threads"}
    chain = unlocked(top, unlocked(one, unlocked(middle, unlocked(base))))
    words = device(chain, "d0")
    words += device(unlocked(second, unlocked(other, **more)), "d1")
    qemu = wrapped(vm_dir, qemu_binary, before=f"cd {vm_dir}")
    vm = await start_qemu([], qemu=qemu, extra=words)
    command = {
        "pivot": ("commit", vm.monitor_path, "vd0"),
        "commit": ("commit", vm.monitor_path, "vd0", "--top", "@1", "--base", "@3"),
        "stream": ("stream", vm.monitor_path, "vd0", "--top", "@2"),
    }[operation]
    await refused(vm, command, "is also a layer of vd1")
    await guest(vm, "read -P 1 1M 1M", "vd1")
    await guest(vm, "read -P 0 3M 1M", "vd1")


async def test_two_disks_in_two_parts_of_one_file(images, start_qemu, invariant, vm_dir):
    """The parts do not meet: a commit into the one leaves the other alone."""
    whole = vm_dir / "whole.raw"
    whole.write_bytes(b"\x01" * 4 * MIB + b"\x02" * 4 * MIB)
    words = []
    for number in range(2):
        part = {
            "driver": "raw",
            "offset": number * 4 * MIB,
            "size": 4 * MIB,
            "file": {"driver": "file", "filename": str(whole), "locking": "off"},
        }
        name = f"over{number}.qcow2"
        await images.img(
            *("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "json:" + json.dumps(part)),
            *(vm_dir / name, 4 * MIB),
        )
        top = {"driver": "qcow2", "node-name": f"d{number}", "backing": part}
        top["file"] = {"driver": "file", "filename": str(vm_dir / name)}
        words += ["-blockdev", json.dumps(top)]
        words += ["-device", f"virtio-blk-pci,drive=d{number},id=vd{number}"]
    vm = await start_qemu([], extra=words)
    invariant.forget(vm)
    await guest(vm, "write -P 9 1M 64K")
    code, _, err = await cli("commit", vm.monitor_path, "vd0")
    assert code == 0, err
    await guest(vm, "read -P 2 0 4M", "vd1")
    await vm.quit()
    content = bytearray(b"\x01" * 4 * MIB + b"\x02" * 4 * MIB)
    content[MIB : MIB + 65536] = b"\x09" * 65536
    assert whole.read_bytes() == content


async def test_a_base_that_another_vm_uses(images, start_qemu, invariant, vm_dir):
    """Our VM takes no locks, and sees none; the other one's say that it relies on the base."""
    base = await images.make("base.qcow2", (1, MIB, MIB))
    for name in ("one.qcow2", "two.qcow2"):
        await images.make(name, (3, 3 * MIB, MIB), backing=base)
    off = f",backing.driver=qcow2,backing.file.driver=file,backing.file.filename={base}"
    off += ",backing.file.locking=off"
    vm = await start_qemu([], extra=disk(vm_dir / "one.qcow2", more=off, extra=",locking=off"))
    other = await start_qemu([], extra=disk(vm_dir / "two.qcow2"))
    command = ("commit", vm.monitor_path, "vd0")
    await refused(vm, command, f"is open in process {other.pid} too")
    await other.quit()
    invariant.forget(vm)
    code, _, err = await cli(*command)
    assert code == 0, err


async def test_root_that_may_not_look_into_processes(images, start_qemu, invariant):
    """In a container, say: what is not seen is no reason to refuse, and none is made up."""
    if os.geteuid():
        pytest.skip("capabilities are root's to drop")
    base = await images.make("store/base.qcow2", (1, MIB, MIB))
    vm = await start_qemu([], extra=disk(base))
    without = ("setpriv", "--bounding-set", "-sys_ptrace")

    async def run(*words):
        ran = await asyncio.to_thread(
            subprocess.run,
            [*without, sys.executable, "-m", "qmpblock", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.returncode, ran.stderr

    code, err = await run("allocate", vm.monitor_path, "vd0", "--full")
    assert code == 2
    assert "with SYS_PTRACE and DAC_READ_SEARCH" in err
    code, err = await run("snapshot", vm.monitor_path, f"vd0={base.parent / 'over.qcow2'}")
    assert code == 0, err
    invariant.forget(vm)
    await guest(vm, "write -P 9 8M 64K")
    code, err = await run("commit", vm.monitor_path, "vd0")
    assert code == 0, err
    await vm.quit()
    assert (await images.content(base))[8 * MIB : 8 * MIB + 65536] == b"\x09" * 65536


async def test_allocate_that_is_refused_has_allocated_nothing(images, start_qemu):
    """A base under another name could not be opened after a crash: that is known beforehand."""
    base = await images.make("store/base.qcow2", (1, MIB, MIB))
    top = await images.make("store/top.qcow2", backing="base.qcow2")
    vm = await start_qemu([], extra=disk(top))
    moved = base.rename(base.parent / "moved.qcow2")
    await refused(vm, ("allocate", vm.monitor_path, "vd0", "--full"), "after a crash")
    moved.rename(base)
    async with qmpblock.connect(vm.monitor_path) as controller:
        seen = await (await controller.disk("vd0")).map(MIB, MIB)
    assert all(extent.depth == 1 for extent in seen), "it came up to the active layer"


@pytest.mark.parametrize("how", ["renamed", "replaced", "removed"])
async def test_an_overlay_that_is_not_under_its_name_is_not_called_by_it(
    how, images, start_qemu, invariant, vm_dir
):
    """The name is another file's by now, or nobody's: that one is not stale."""
    base = await images.make("base.qcow2", (1, MIB, MIB))
    top = await images.make("top.qcow2", (2, 2 * MIB, MIB), backing="base.qcow2")
    saved = vm_dir / "saved.qcow2"
    vm = await start_qemu([], extra=disk(top))
    top.rename(saved)
    if how == "replaced":
        await images.make("top.qcow2", (6, 0, MIB))
    elif how == "removed":
        saved.unlink()
    code, out, err = await cli("commit", vm.monitor_path, "vd0")
    invariant.forget(vm)
    assert f"{top} is stale" not in out
    if how == "removed":
        assert code == 4, err
        assert f"@0 {top} is not the name any more of what the VM has open" in err
    else:
        assert code == 0, err
        assert f"no longer in the chain: {saved}\n" in out
        assert f"{saved} is stale from now on" in out
    await vm.quit()
    assert (await images.content(base))[: 3 * MIB] == bytes(MIB) + b"\1" * MIB + b"\2" * MIB
