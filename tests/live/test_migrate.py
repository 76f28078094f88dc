"""Live migration: the guest arrives with all that it was told is written, or stays where it was."""

import pytest
from migrating import arrived, machine, migrated, stressed

from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to all of its disks."""

    async def start(text=None, *, rate=300, **options):
        built = await build(
            parse_scenario(text or machine(), "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        return await stressed(await start_qemu(built, guest=True, **options), rate)

    return start


async def test_the_memory_alone(begin, start_destination):
    source = await begin()
    destination = await start_destination(source, shared=True)
    result = await migrated(source, destination, memory_only=True)
    assert result.disks == ()
    await arrived(source, destination, result)


async def test_a_disk_and_the_memory(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))


@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("image", ["qcow2", "raw"])
@pytest.mark.parametrize("iothread", ["none", "one"])
@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_every_kind_of_disk(device, iothread, image, number, begin, start_destination):
    text = machine(number, device=device, iothread=iothread, image=image)
    source = await begin(text, rate=100)
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))
