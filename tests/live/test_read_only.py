"""Read-only means read-only: disks that a VM has only to read, and images it may not write to."""

import asyncio
import json
import os
import subprocess
from contextlib import asynccontextmanager

import peers
import pytest
from chains import cli
from disturbed import nothing_of_ours, until

import qmpblock
from qmpblock.changes.bitmaps import delete_bitmap
from qmpblock.errors import UnsupportedError

pytestmark = pytest.mark.live

RAW = "about: One.\nimages:\n  - {format: raw, size: 16M, content: [write 0 1M 0xaa]}\n"


LAYERS = """\
about: An image over one that holds a persistent dirty bitmap.
images:
  - {size: 16M, content: [write 0 1M 0xaa]}
  - {}
"""


def files_of(built):
    """Return content and blocks of each image."""
    paths = [layer.path for layer in built.disks[0].active.chain()]
    return {path: (path.read_bytes(), path.stat().st_blocks) for path in paths}


def blockdev(built):
    described = built.disks[0].active.describe(node="d0", live=True)
    described["read-only"] = described["file"]["read-only"] = True
    described["file"]["auto-read-only"] = False
    described.pop("discard", None)
    return ["-blockdev", json.dumps(described), "-device", "virtio-blk-pci,drive=d0,id=vd0"]


def drive(built):
    active = built.disks[0].active
    text = f"file={active.path},format={active.spec.format},if=none,id=d0,read-only=on"
    return ["-drive", text, "-device", "virtio-blk-pci,drive=d0,id=vd0"]


def cd(built):
    active = built.disks[0].active
    text = f"file={active.path},format={active.spec.format},if=none,id=d0,media=cdrom"
    return ["-drive", text, "-device", "ide-cd,drive=d0,id=vd0"]


def verbs(disk, directory):
    """Return every verb that writes to a disk, as coroutines."""

    async def run(job):
        async with job:
            pass

    found = {
        "snapshot": disk.snapshot(directory / "overlay.qcow2"),
        "allocate": disk.allocate(0, 4 << 20),
        "allocate full": disk.allocate(full=True),
        "allocate independent": disk.allocate(independent=True),
        "make_room": disk.make_room(1 << 20),
        "keep_ahead": asyncio.wait_for(disk.keep_ahead(1 << 20), 10),
    }
    if len(disk.chain.layers) > 1:
        found |= {
            "commit": run(disk.commit()),
            "commit of middle layers": run(disk.commit(top="@1")),
            "stream": run(disk.stream()),
            "stream into a middle layer": run(disk.stream(top="@1")),
        }
    return found


@pytest.mark.parametrize("images", [(), (RAW,)], ids=["chain", "raw"])
@pytest.mark.parametrize("attach", [blockdev, drive, cd])
async def test_a_disk_for_reading_only_is_not_written(
    attach, images, start_qemu, build_images, vm_dir
):
    built = await build_images(*images)
    vm = await start_qemu([], extra=attach(built))
    before = files_of(built)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        assert disk.device.read_only
        for name, verb in verbs(disk, vm_dir / "images").items():
            with pytest.raises(UnsupportedError, match="for reading only") as caught:
                await verb
            assert caught.value.standing == "nothing was touched", name
        await disk.refresh()
        assert disk.device.read_only
        await disk.map()  # which writes nothing
    assert files_of(built) == before
    assert not (vm_dir / "images" / "overlay.qcow2").exists()
    await nothing_of_ours(vm)


@pytest.mark.parametrize("attach", [blockdev, drive, cd])
async def test_it_is_copied(attach, start_qemu, build_images, vm_dir):
    """Nothing of it is written, so nothing speaks against that: a CD beside the disk, say."""
    built = await build_images()
    vm = await start_qemu([], extra=attach(built))
    before = files_of(built)
    image = str(built.disks[0].active.path)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        points = ["end"] if vm.version < (10,) else ["start", "end"]  # a frozen one is written to
        for at in points:
            target = vm_dir / f"{at}.qcow2"
            async with controller.copy({disk: target}, at=at, verify=at == "start"):
                pass
            result = await qmpblock.verify_images(image, str(target), format="qcow2")
            assert result.equal, at
        async with disk.point_in_time() as point:
            assert point.uri
        await disk.refresh()
        assert disk.device.read_only
    assert files_of(built) == before
    await nothing_of_ours(vm)


async def test_a_policy_for_it_is_refused(start_qemu, build_images, vm_dir):
    built = await build_images()
    vm = await start_qemu([], extra=blockdev(built))
    before = files_of(built)
    policy = vm_dir / "policy.yaml"
    text = f"vms:\n- address: {vm.monitor_path}\n  disks:\n  - {{disk: vd0, allocation: full}}\n"
    policy.write_text(text)
    for command in ("plan", "apply"):
        code, out, err = await cli(command, str(policy))
        assert code in (1, 2), err
        assert "for reading only" in out + err
    assert files_of(built) == before


# -- images that QEMU may not open for writing: the remedy fits the cause


async def remedy(vm):
    """Return the remedy when the base is to be written to."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(UnsupportedError, match="for reading only") as caught:
            async with disk.commit():
                pass
    assert caught.value.standing == "nothing was changed"
    await nothing_of_ours(vm)
    return caught.value.remedy


@asynccontextmanager
async def served(tools, path, socket):
    """Serve an image read-only by NBD."""
    program = tools.img.replace("qemu-img", "qemu-nbd")
    options = ("--read-only", "-t", "-f", "raw", "-k", str(socket))
    server = subprocess.Popen([program, *options, str(path)])
    try:
        await until(lambda: peers.listens(socket), "the NBD server")
        yield
    finally:
        server.kill()
        server.wait()


async def test_the_remedy_for_an_nbd_server_that_serves_it_read_only(
    start_qemu, build_images, vm_dir
):
    built = await build_images()
    tools = built.tools
    top, *_, base = built.disks[0].active.chain()
    socket = vm_dir / "nbd"
    server = {"type": "unix", "path": str(socket)}
    storage = {"driver": "nbd", "node-name": "far", "server": server, "auto-read-only": True}
    layer = {"driver": "qcow2", "node-name": "d1", "file": "far", "read-only": True}
    active = {"driver": "qcow2", "node-name": "d0", "backing": "d1"}
    active["file"] = {"driver": "file", "filename": str(top.path)}
    extra = [word for node in (storage, layer, active) for word in ("-blockdev", json.dumps(node))]
    extra += ["-device", "virtio-blk-pci,drive=d0,id=vd0"]
    async with served(tools, base.path, socket):
        vm = await start_qemu([], extra=extra)
        assert "NBD client, and the server" in await remedy(vm)
        await vm.quit()


async def test_the_remedy_for_a_file_that_may_not_be_written(start_qemu, build_images, invariant):
    built = await build_images()
    base = built.disks[0].active.chain()[-1].path
    root = os.geteuid() == 0
    if root and subprocess.run(["chattr", "+i", str(base)], capture_output=True).returncode:
        pytest.skip("root may write to anything on this file system")
    base.chmod(0o444) if not root else None
    try:
        vm = await start_qemu(built)
        invariant.forget(vm)
        said = await remedy(vm)
        assert f"the right to write to {base}" in said
        await vm.quit()
    finally:
        if root:
            subprocess.run(["chattr", "-i", str(base)], check=True)


async def test_the_remedy_for_a_storage_node_that_is_read_only(start_qemu, build_images):
    built = await build_images()
    described = built.disks[0].active.describe(node="d0", live=True)
    lowest = described["backing"]["backing"]
    lowest["file"] |= {"read-only": True, "auto-read-only": False}
    lowest["read-only"] = True
    extra = ["-blockdev", json.dumps(described), "-device", "virtio-blk-pci,drive=d0,id=vd0"]
    vm = await start_qemu([], extra=extra)
    said = await remedy(vm)
    assert "was started with read-only=on for its storage node d0-2-file" in said


async def test_a_bitmap_that_is_stored_stays_and_that_is_said(start_qemu, build_images, caplog):
    """Undoing goes on: in an image that is read-only by now nobody can remove it."""
    built = await build_images(LAYERS)
    base = built.disks[0].active.chain()[1].path
    await built.tools.run(built.tools.img, "bitmap", "--add", str(base), "ours")
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path) as controller:
        await delete_bitmap(controller, "d0-1", "ours")
        assert "the dirty bitmap ours stays in d0-1, which is read-only now" in caplog.text
        assert [one.name for one in (await controller.graph()).nodes["d0-1"].bitmaps] == ["ours"]
        caplog.clear()
        await delete_bitmap(controller, "d0-1", "not there")
        assert not caplog.text
