"""Migrations in which a storage daemon has the destination's images while they are mirrored."""

import os
import signal

import pytest
from migrating import arrived, at, both, machine, migrated, stays, storage_daemons, stressed

import qmpblock
from qmpblock.migration import homeward
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live
PHASES = ("copying", "ready", "memory", "active", "held", "ended", "sent", "landed")


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    async def start(text=None, **options):
        built = await build(
            parse_scenario(text or machine(), "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        return await stressed(await start_qemu(built, guest=True, **options))

    return start


async def again(source, start_destination):
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination, storage_daemon=True))


@pytest.fixture
def daemons(vm_dir):
    """Give what tells the storage daemons that have images of this test; at its end none does."""

    def find():
        return storage_daemons(vm_dir)

    yield find
    assert find() == []


@pytest.mark.parametrize("image", ["qcow2", "raw"])
@pytest.mark.parametrize("iothread", ["none", "one"])
@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_every_kind_of_disk(device, iothread, image, begin, start_destination, daemons):
    source = await begin(machine(2, device=device, iothread=iothread, image=image))
    destination = await start_destination(source)
    result = await migrated(source, destination, storage_daemon=True)
    await arrived(source, destination, result)


@pytest.mark.parametrize("phase", PHASES)
async def test_the_daemon_dies(phase, begin, start_destination, invariant, monkeypatch, daemons):
    source = await begin(machine(2))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)
    died = []

    async def killing():
        died.extend(daemons())
        for pid in died:
            os.kill(pid, signal.SIGKILL)

    with at(monkeypatch, phase, killing):
        if phase in ("ended", "sent", "landed"):
            result = await migrated(source, destination, storage_daemon=True)
            assert len(died) == (phase == "ended")
            await arrived(source, destination, result)
            return
        with pytest.raises(qmpblock.Error) as failed:
            await migrated(source, destination, storage_daemon=True)
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    assert "the storage daemon has ended (exit code -9)" in str(failed.value)
    await stays(source, invariant)
    await again(source, start_destination)


@pytest.mark.parametrize("phase", PHASES)
async def test_the_daemon_falls_silent(
    phase, begin, start_destination, invariant, monkeypatch, daemons
):
    monkeypatch.setattr(homeward, "HOLD", 2.0)
    source = await begin(machine(2))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def stopping():
        for pid in daemons():
            os.kill(pid, signal.SIGSTOP)

    with at(monkeypatch, phase, stopping):
        if phase in ("ended", "sent", "landed"):
            result = await migrated(source, destination, storage_daemon=True)
            await arrived(source, destination, result)
            return
        with pytest.raises(qmpblock.Error) as failed:
            async with (
                both(source, destination, stall=4) as vms,
                qmpblock.migrate(*vms, storage_daemon=True),
            ):
                pass
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    await stays(source, invariant)
    await again(source, start_destination)


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_destination_dies(
    phase, device, begin, start_destination, invariant, monkeypatch, daemons
):
    """With an iothread: that of 7.2 does not die of its own export, for it has none."""
    source = await begin(machine(2, device=device, iothread="one"))
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def killing():
        await destination.kill()

    with at(monkeypatch, phase, killing), pytest.raises(qmpblock.Error) as failed:
        await migrated(source, destination, storage_daemon=True)
    assert "the guest runs at the source" in str(failed.value)
    await stays(source, invariant)
    await again(source, start_destination)
