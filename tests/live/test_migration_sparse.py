"""What is sparse stays sparse: zeros and holes of the source take no room at the destination."""

import pytest
from migrating import migrated, stressed

from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
TIB = 1 << 40


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to all of its disks."""

    async def start(text, **options):
        built = await build(
            parse_scenario(text, "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        return await stressed(await start_qemu(built, guest=True, **options), 100)

    return start


def disk(size, image, *, content="write 0 8M 0xaa"):
    return (
        "about: One disk.\ndisks:\n  - {name: d0, images: "
        f"[{{size: {size}, format: {image}, content: [{content}]}}]}}\n"
    )


def room(vm):
    """Return how much its image takes on the host, in bytes."""
    return vm.disks[0].active.path.stat().st_blocks * 512


async def content(source, vm):
    """Stop the guest and both QEMUs; return what the image holds."""
    await source.quit()
    guest = await vm.attach_guest()
    assert (await guest.stop_stress()).bad == 0
    await vm.quit()
    active, tools = vm.disks[0].active, Tools.of(vm.command[0])
    raw = active.path.parent / "content"
    words = ("convert", "-f", active.spec.format, "-O", "raw", str(active.path), str(raw))
    await tools.run(tools.img, *words)
    return raw.read_bytes()


@pytest.mark.parametrize("there", ["qcow2", "raw"])
async def test_two_tib_of_nothing(there, begin, start_destination):
    """Neither is it gone over, nor does it take room."""
    content = "write 0 8M 0xaa, write 512G 4M 0xbb, zero 1T 4M"
    source = await begin(disk("2T", "qcow2", content=content))
    destination = await start_destination(source, image=there)
    result = await migrated(source, destination)
    [one] = result.disks
    assert one.size == 2 * TIB
    assert one.copied < 64 * MIB
    assert room(destination) < room(source) + 4 * MIB


@pytest.mark.parametrize("there", ["qcow2", "raw"])
async def test_holes_of_a_raw_image_stay_holes(there, begin, start_destination):
    """QEMU goes over all of it, and a qcow2 image gets tables for it on 7.2, but no clusters."""
    source = await begin(disk("64G", "raw", content="write 0 8M 0xaa, write 32G 4M 0xbb"))
    destination = await start_destination(source, image=there)
    await migrated(source, destination)
    assert room(destination) < room(source) + 16 * MIB


@pytest.mark.parametrize("layers", [1, 2])
async def test_what_was_in_the_destinations_image_is_gone(
    layers, begin, start_qemu, vm_dir, qemu_binary
):
    """One that is not blank is not taken for one that is."""
    above = ", {content: [zero 4M 2M]}" if layers == 2 else ""
    images = f"[{{size: 64M, content: [write 0 8M 0xaa]}}{above}]"
    source = await begin(f"about: One.\ndisks:\n  - {{name: d0, images: {images}}}\n")
    tools = Tools.of(qemu_binary)
    old = parse_scenario(disk("64M", "qcow2", content="write 40M 4M 0xcc"), "there")
    built = await build(old, vm_dir / "there", tools)
    options = {"machine": source.machine, "guest": True, "incoming": "defer", "extra": ["-S"]}
    destination = await start_qemu(built.disks, **options)
    await migrated(source, destination)
    data = await content(source, destination)
    assert data[40 * MIB : 44 * MIB] == bytes(4 * MIB)
    assert data[4 * MIB : 6 * MIB] == (bytes(2 * MIB) if layers == 2 else b"\xaa" * (2 * MIB))
    assert data[6 * MIB : 8 * MIB] == b"\xaa" * (2 * MIB)


@pytest.mark.parametrize("there", ["qcow2", "raw"])
async def test_zeros_that_a_chain_hides_data_with(there, begin, start_destination):
    """What lies below a zero cluster of the active layer is not seen through a blank image."""
    chain = "[{size: 64M, content: [write 0 8M 0xaa]}, {content: [zero 4M 2M]}]"
    source = await begin(f"about: A chain.\ndisks:\n  - {{name: d0, images: {chain}}}\n")
    destination = await start_destination(source, image=there)
    await migrated(source, destination)
    assert room(destination) < 16 * MIB
    data = await content(source, destination)
    assert data[: 8 * MIB] == b"\xaa" * (4 * MIB) + bytes(2 * MIB) + b"\xaa" * (2 * MIB)
