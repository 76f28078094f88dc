"""Images that must not be written to: marked as corrupt, or never closed and never repaired.

QEMU opens both for reading, as a layer of a chain, and a job would make them writable: no VM
starts from the one any more, and the other loses data without an error.
"""

import json

import pytest
from disturbed import nothing_of_ours
from refused import fitting
from refused import refused as refused_by_qemu

import qmpblock
from qmpblock.errors import CommandError, UnsupportedError
from qmpblock.testing.qemu import QemuProcess

pytestmark = pytest.mark.live

MIB = 1 << 20
INCOMPATIBLE = 79  # the last byte of that field of a qcow2 header; bit 1: corrupt
CORRUPT = 2
LAZY = """\
about: An image that keeps its reference counts in memory while it is in use.
images:
  - {size: 16M, options: {lazy_refcounts: on}, content: [write 0 1M 0xaa]}
"""


def mark_corrupt(path):
    with path.open("r+b") as file:
        file.seek(INCOMPATIBLE)
        old = file.read(1)[0]
        file.seek(INCOMPATIBLE)
        file.write(bytes([old | CORRUPT]))


async def refused(disk, operation, **arguments):
    with pytest.raises(UnsupportedError) as caught:
        async with getattr(disk, operation)(**arguments):
            pass
    assert caught.value.exit_code == 2
    assert caught.value.standing == "nothing was touched"
    return caught.value


@pytest.mark.parametrize(
    ("layer", "operation", "arguments"),
    [
        (2, "commit", {}),
        (2, "commit", {"top": "@1"}),
        (1, "commit", {"base": "@1"}),
        (1, "stream", {"top": "@1"}),
    ],
)
async def test_a_corrupt_image_is_not_written(
    layer, operation, arguments, start_qemu, build_images
):
    built = await build_images()
    path = built.disks[0].active.chain()[layer].path
    mark_corrupt(path)
    before = path.read_bytes()
    vm = await start_qemu(built)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        error = await refused(disk, operation, **arguments)
        assert f"@{layer} {path} must not be written to: QEMU has marked it as corrupt" in str(
            error
        )
    await nothing_of_ours(vm)
    assert path.read_bytes() == before


async def test_what_a_corrupt_image_holds_can_be_saved(start_qemu, build_images, invariant):
    """By the remedy that is given: a stream; and a commit of the layer itself."""
    built = await build_images()
    for layer in built.disks[0].active.chain()[1:]:
        mark_corrupt(layer.path)
    vm = await start_qemu(built)
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with disk.stream():
            pass
        assert len(disk.chain.layers) == 1
    for number, byte in enumerate((0xAA, 0xBB, 0xCC)):
        await vm.qemu_io("d0", f"read -P {byte} {number}M 1M")


async def test_an_image_that_was_never_closed_is_not_written(
    start_qemu, build_images, vm_dir, qemu_binary
):
    """Its QEMU was killed; nobody opened it for writing since, which repairs it."""
    built = await build_images(LAZY)
    tools = built.tools
    base = built.disks[0].active.path
    async with QemuProcess.of(built, qemu=qemu_binary) as first:
        await first.qemu_io("d0", "write -P 0x55 4M 2M")
        await first.qemu_io("d0", "flush")
        first.expect_exit()
        await first.kill()
    overlay = vm_dir / "images" / "overlay.qcow2"
    await tools.run(
        tools.img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(overlay)
    )
    before = base.read_bytes()
    described = {
        "driver": "qcow2",
        "node-name": "d0",
        "file": {"driver": "file", "filename": str(overlay)},
    }
    extra = ["-blockdev", json.dumps(described), "-device", "virtio-blk-pci,drive=d0,id=vd0"]
    vm = await start_qemu([], extra=extra)
    path = "/machine/peripheral/vd0/virtio-backend"
    await vm.qemu_io_at(path, "write -P 0xcc 8M 2M")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        error = await refused(disk, "commit")
        assert f"{base} must not be written to: it was not closed" in str(error)
        assert f"qemu-img check -f qcow2 -r all {base}" in error.remedy
    await nothing_of_ours(vm)
    await vm.quit()
    assert base.read_bytes() == before


async def test_an_image_in_use_is_not_taken_for_one_that_was_never_closed(
    start_qemu, build_images, vm_dir, invariant
):
    """Lazy reference counts say so of every image that is in use."""
    built = await build_images(LAZY)
    vm = await start_qemu(built)
    invariant.forget(vm)
    await vm.qemu_io("d0", "write -P 0x55 4M 1M")
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        await disk.refresh()
        assert disk.chain.active.node.unclean
        await disk.snapshot(vm_dir / "images" / "one.qcow2")
        await vm.qemu_io("d0", "write -P 0x66 6M 1M")
        async with disk.commit():
            pass
        await disk.allocate(full=True)
    await vm.qemu_io("d0", "read -P 0x55 4M 1M")
    await vm.qemu_io("d0", "read -P 0x66 6M 1M")
    await vm.quit()
    await built.disks[0].active.check(built.tools)


def point_at_metadata(path):
    """Have the first cluster of a qcow2 image lie where its L1 table does."""
    with path.open("r+b") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(l2)
        file.write((1 << 63 | l1).to_bytes(8, "big"))


async def test_an_image_that_qemu_finds_corrupt_meanwhile(start_qemu, build_images, invariant):
    """QEMU does not describe any of its nodes then: all that can be said is why."""
    text = "about: One.\nimages:\n  - {size: 4M, content: [write 0 1M 0xaa]}\n"
    built = await build_images(text)
    point_at_metadata(built.disks[0].active.path)
    vm = await start_qemu(built)
    invariant.forget(vm)
    path = "/machine/peripheral/vd0/virtio-backend"
    with pytest.raises(CommandError, match="rror"):
        await vm.qemu_io_at(path, "write -P 5 0 64k")
    error = await refused_by_qemu(vm.execute("query-named-block-nodes", flat=True))
    assert fitting(error) == {"is_ejected"}
    async with qmpblock.connect(vm.monitor_path) as controller:
        with pytest.raises(UnsupportedError, match="found an image corrupt") as caught:
            await controller.disks()
    assert "qemu-img check" in caught.value.remedy
