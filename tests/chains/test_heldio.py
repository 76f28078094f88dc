"""Which devices get no pivot, by their QOM types. With QEMUs: live/test_held_io.py."""

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.chains.heldio import check_held_io, must_pause
from qmpblock.errors import UnsupportedError


async def check(tmp_path, kind):
    async with fake_vm(tmp_path / "q", chain("d0").device("d0")) as (vm, qemu):
        device = (await vm.graph()).device("vd0")
        if kind is not None:
            qemu.objects[device.qom_path.rpartition("/")[2]] = kind
        await check_held_io(vm.monitor, device, remedy="do otherwise")


@pytest.mark.parametrize("kind", ["virtio-blk-device", "scsi-hd", "ide-hd", "ide-cd", "nvme-ns"])
async def test_devices_that_go_on(kind, tmp_path):
    await check(tmp_path, kind)


@pytest.mark.parametrize("kind", ["cfi.pflash01", "floppy", "sd-card", "of tomorrow\x1b"])
async def test_others_are_refused_known_or_not(kind, tmp_path):
    with pytest.raises(UnsupportedError) as caught:
        await check(tmp_path, kind)
    assert caught.value.exit_code == 2
    assert caught.value.standing == "nothing was touched"
    assert caught.value.remedy == "do otherwise"
    assert "\x1b" not in str(caught.value)


async def test_one_that_does_not_say_what_it_is(tmp_path):
    with pytest.raises(UnsupportedError, match="what kind of device vd0 is cannot be told"):
        await check(tmp_path, None)


@pytest.mark.parametrize(
    ("major", "onto", "objects", "wanted"),
    [
        (7, "raw", {"vd0": True}, False),
        (7, "raw", {"vd0": False}, True),
        (7, "luks", {"vd0": False}, True),
        (7, "raw", {}, True),  # nothing tells
        (7, "qcow2", {"vd0": False}, False),
        (10, "raw", {"vd0": False}, False),
    ],
)
async def test_when_the_vm_is_paused_for_a_pivot(major, onto, objects, wanted, tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0").device("d0"), major=major) as (vm, qemu):
        qemu.objects |= objects
        device = (await vm.graph()).device("vd0")
        assert await must_pause(vm, device, onto) is wanted
