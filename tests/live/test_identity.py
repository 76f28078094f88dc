"""Which file an image is: what QEMU has open, whatever its name and wherever QEMU lives.

Each of these was refused as "not on this host", or recorded a name that led elsewhere.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from chains import cli

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
    path = f"/machine/peripheral/{disk}/virtio-backend"
    said = await vm.hmp(f'qemu-io -d {path} "{command}"')
    assert "rror" not in said, said
    assert "failed" not in said, said


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


async def test_a_vm_that_left_its_directory(images, start_qemu, vm_dir, qemu_binary):
    """-daemonize goes to the root directory; what a relative name was, the descriptors tell."""
    image = await images.make("store/disk.qcow2", (7, MIB, MIB))
    other = await images.make("other/disk.qcow2", (8, MIB, MIB))
    monitor, pidfile = vm_dir / "qmp", vm_dir / "pid"
    (vm_dir / "idle.rom").touch()
    command = [qemu_binary, "-nodefaults", "-no-user-config", "-display", "none", "-m", "16"]
    command += ["-machine", "pc,accel=tcg", "-daemonize", "-pidfile", str(pidfile)]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    command += [*disk("store/disk.qcow2"), *disk(other, node="d1")]
    started = await asyncio.create_subprocess_exec(
        *command, cwd=vm_dir, env={**os.environ, "PWD": "/"}, stdout=-3, stderr=-3
    )
    assert await started.wait() == 0
    pid = int(pidfile.read_text())
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        code, _, err = await cli("allocate", str(monitor), "vd0", "--full")
        assert code == 0, err
        overlay = vm_dir / "over.qcow2"
        code, _, err = await cli("snapshot", str(monitor), f"vd0={overlay}")
        assert code == 0, err
    finally:
        os.kill(pid, 15)
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)
    assert image.stat().st_blocks * 512 >= SIZE - MIB
    assert await images.backing(overlay) == "store/disk.qcow2"
    assert await images.content(overlay) == await images.content(image)


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
async def test_over_tcp_it_says_that_it_cannot_tell(scenario, start_qemu, invariant):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        monitor = f"127.0.0.1:{sock.getsockname()[1]}"
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
