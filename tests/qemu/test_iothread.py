"""Which iothread a disk runs in, by QEMU's answers. With QEMUs: live/test_export.py."""

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.errors import UnsupportedError
from qmpblock.qemu.iothread import iothread_of

THREADS = [{"id": "io0"}]
DISK = "/machine/peripheral/vd0"


async def found(tmp_path, properties, threads=THREADS):
    """Ask of a VM in which objects have these properties, by path and name."""
    async with fake_vm(tmp_path / "q", chain("d0").device("d0")) as (vm, qemu):
        plain = qemu.get

        def get(command, default=None):
            if command != "qom-get":
                return plain(command, default)
            arguments = qemu.fake.seen[-1]["arguments"]
            value = properties.get((arguments["path"], arguments["property"]))
            if value is None:
                return {"error": {"class": "GenericError", "desc": "Property not found"}}
            return {"return": value}

        qemu.get = get
        device = (await vm.graph()).device("vd0")
        return await iothread_of(vm.monitor, device, threads)


async def test_the_devices_own(tmp_path):
    assert await found(tmp_path, {(DISK, "iothread"): "/objects/io0"}) == "io0"


async def test_that_of_the_controller_that_it_hangs_on(tmp_path):
    properties = {
        (DISK, "parent_bus"): "/machine/peripheral/s0/virtio-backend/s0.0",
        ("/machine/peripheral/s0", "iothread"): "/objects/io0",
    }
    assert await found(tmp_path, properties) == "io0"


async def test_none(tmp_path):
    assert await found(tmp_path, {(DISK, "iothread"): ""}) is None
    assert await found(tmp_path, {}, threads=[]) is None


async def test_a_tree_without_an_end_is_not_guessed_at(tmp_path):
    """Whether a drain or an export is a danger there nobody knows."""
    circle = {(DISK, "parent_bus"): f"{DISK}/bus"}
    with pytest.raises(UnsupportedError, match="vd0 runs in an iothread cannot be told"):
        await found(tmp_path, circle)
