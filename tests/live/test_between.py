"""Images with nodes between the format and the file: named raw nodes, throttles, parts."""

import json

import pytest
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

MIB = 1 << 20
BETWEEN = {
    "raw": [{"driver": "raw", "node-name": "r"}],
    "throttle": [{"driver": "throttle", "node-name": "t", "throttle-group": "group"}],
    "both": [
        {"driver": "throttle", "node-name": "t", "throttle-group": "group"},
        {"driver": "raw", "node-name": "r"},
    ],
}


def node(**options):
    named = {key.replace("_", "-"): value for key, value in options.items()}
    return ["-blockdev", json.dumps(named)]


def command_line(built, between):
    """Return options that put nodes, the lowest first, between each image and its file."""
    found = ["-object", "throttle-group,id=group"]
    for depth, image in reversed(list(enumerate(built.disks[0].active.chain()))):
        below = f"f{depth}"
        found += node(driver="file", node_name=below, filename=str(image.path))
        for options in between:
            name = f"{options['node-name']}{depth}"
            found += node(**{**options, "node-name": name, "file": below})
            below = name
        backing = {"backing": f"d{depth + 1}"} if image.backing is not None else {}
        found += node(driver="qcow2", node_name=f"d{depth}", file=below, **backing)
    return [*found, "-device", "virtio-blk-pci,drive=d0,id=vd0"]


async def nodes(vm):
    return {one["node-name"] for one in await vm.execute("query-named-block-nodes", flat=True)}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("operation", ["commit", "middle", "stream", "full"])
async def test_what_is_between_is_the_images_own(
    operation, between, start_qemu, build_images, invariant
):
    """It is nobody else's, names the layer, and is closed with it."""
    built = await build_images()
    vm = await start_qemu([], extra=command_line(built, BETWEEN[between]))
    invariant.forget(vm)
    before = await nodes(vm)
    uppermost = BETWEEN[between][-1]["node-name"]
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(f"{uppermost}0")
        assert disk.name == "vd0"
        assert [one.layer.file for one in await disk.layers()] == [
            str(image.path) for image in built.disks[0].active.chain()
        ]
        if operation == "full":
            await disk.allocate(full=True)
            left = before
        else:
            job = {
                "commit": disk.commit(),
                "middle": disk.commit(top=f"{uppermost}1"),
                "stream": disk.stream(top=f"{uppermost}0", base="@2"),
            }[operation]
            async with job:
                pass
            gone = "01" if operation == "commit" else "1"
            left = {name for name in before if name[-1] not in gone}
    assert await nodes(vm) == left
    path = "/machine/peripheral/vd0/virtio-backend"
    for number, byte in enumerate((0xAA, 0xBB, 0xCC)):
        await vm.qemu_io_at(path, f"read -P {byte} {number}M 1M")
    await nothing_of_ours(vm)


async def test_a_part_of_a_file_is_not_taken_for_the_file(
    start_qemu, vm_dir, qemu_binary, invariant
):
    """At the file's beginning lies another image, which nobody has open."""
    tools = Tools.of(qemu_binary)
    base, other, top = (vm_dir / name for name in ("base", "other", "top"))
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(base), "8M")
    await tools.run(tools.io, "-f", "qcow2", "-c", "write -P 0xaa 1M 1M", str(base))
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(other), "8M")
    await tools.run(tools.io, "-f", "qcow2", "-c", "write -P 0x11 5M 2M", str(other))
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(top), "8M")
    both = vm_dir / "both"
    both.write_bytes(other.read_bytes().ljust(4 * MIB, b"\0") + base.read_bytes())
    size = 12 * MIB
    with both.open("r+b") as file:
        file.truncate(4 * MIB + size)
    extra = [
        *node(driver="file", node_name="f1", filename=str(both)),
        *node(driver="raw", node_name="r1", file="f1", offset=4 * MIB, size=size),
        *node(driver="qcow2", node_name="d1", file="r1"),
        *node(driver="file", node_name="f0", filename=str(top)),
        *node(driver="qcow2", node_name="d0", file="f0", backing="d1"),
        *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
    ]
    vm = await start_qemu([], extra=extra)
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        _, lower = await disk.layers()
        held = lower.map.where(present=True, data=True)
        assert (held.total, list(held)) == (MIB, [(MIB, 2 * MIB)])
        async with disk.commit():
            pass
        blocks = both.stat().st_blocks
        with pytest.raises(UnsupportedError, match="only a part"):
            await disk.make_room(MIB)
        assert both.stat().st_blocks == blocks
    await nothing_of_ours(vm)
