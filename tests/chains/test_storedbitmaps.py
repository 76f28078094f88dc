"""When an image is tried to be opened anew, and what is done where QEMU says something else."""

from types import SimpleNamespace

import pytest

from qmpblock.chains.storedbitmaps import check_frozen_ones, check_opened_anew
from qmpblock.errors import CommandError, UnsupportedError
from qmpblock.graph.model import Bitmap, Layer, Node

KEPT = Bitmap("kept", 65536, recording=True, persistent=True)
PASSING = Bitmap("passing", 65536, recording=True, persistent=False)
MISSING = "Could not open 'disk': No such file or directory"
FIXED = "Bitmap 'kept' is readonly and cannot be modified"


def layer(*bitmaps, driver="file", read_only=False):
    file = Node("f", driver, "disk", 0, read_only)
    return Layer(0, Node("n", "qcow2", "disk", 0, read_only, bitmaps=bitmaps), file)


def monitor(refusal=""):
    asked = []

    async def execute(command, arguments):
        asked.append(command)
        if refusal:
            raise CommandError(command, arguments, "GenericError", refusal)

    return SimpleNamespace(execute=execute, asked=asked)


async def test_only_files_with_bitmaps_that_are_kept_are_tried():
    for one in (layer(), layer(PASSING), layer(KEPT, driver="nbd")):
        vm = monitor(MISSING)
        await check_opened_anew(vm, one, "ours")
        assert vm.asked == []
    vm = monitor()
    await check_opened_anew(vm, layer(PASSING, KEPT), "ours")
    assert vm.asked == ["blockdev-add", "blockdev-del"]


async def test_what_cannot_be_opened_is_refused_and_what_else_qemu_says_is_passed_on():
    with pytest.raises(UnsupportedError, match="persistent dirty bitmap kept"):
        await check_opened_anew(monitor(MISSING), layer(KEPT), "ours")
    with pytest.raises(CommandError, match="Duplicate"):
        await check_opened_anew(monitor("Duplicate nodes"), layer(KEPT), "ours")


async def test_only_a_writable_base_is_asked_about_its_bitmaps():
    vm = monitor(FIXED)
    await check_frozen_ones(vm, layer(KEPT, read_only=True))
    await check_frozen_ones(vm, layer(PASSING))
    assert vm.asked == []
    with pytest.raises(UnsupportedError, match="nothing can be written to disk any more"):
        await check_frozen_ones(vm, layer(KEPT))
    with pytest.raises(CommandError, match="in use"):
        await check_frozen_ones(monitor("Bitmap 'kept' is in use"), layer(KEPT))
