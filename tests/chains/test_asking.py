"""A manager that was asked to change a chain comes to have it as QEMU does. Real ones: live."""

from types import SimpleNamespace

import pytest

from qmpblock.chains.asking import Asking
from qmpblock.errors import GraphError
from qmpblock.managers import Work

WHOLE, SHORT = [("/i/d0", "vda[1]"), ("/i/d1", "vda[2]")], [("/i/d0", "vda[1]")]
WORK = Work("commit", "/i/d0", "/i/d1", "/i/d2")


def asking(*says, stall=60.0):
    """Return what asks a manager of a disk of one layer, which says this one after the other."""
    left = list(says)

    async def layers(name):
        assert name == "vda"
        return left.pop(0) if len(left) > 1 else left[0]

    async def through(ask):
        return await ask(SimpleNamespace(layers=layers))

    monitor = SimpleNamespace(through=through, address="libvirt:web")
    disk = SimpleNamespace(
        vm=SimpleNamespace(monitor=monitor, stall=stall),
        chain=SimpleNamespace(layers=(SimpleNamespace(),)),
    )
    return Asking(disk, "vda", standing="as it was", work=WORK)


async def test_a_layer_without_a_name_is_named_by_its_file():
    with pytest.raises(GraphError, match="by what name it knows /i/d1") as caught:
        asking(SHORT).named(("/i/d1", ""))
    way = "virsh blockcommit DOMAIN /i/d0 --top /i/d1 --base /i/d2 --wait"
    assert caught.value.remedy == way


async def test_before_anything_it_has_to_agree_at_once():
    assert await asking(SHORT).layers() == SHORT
    with pytest.raises(GraphError, match="libvirt takes /i/d0, /i/d1 for the chain of vda"):
        await asking(WHOLE, SHORT).layers()


async def test_it_notes_the_end_of_its_job_after_qemu_has_shown_it():
    await asking(WHOLE, WHOLE, SHORT).agree()


async def test_it_never_does():
    with pytest.raises(GraphError, match="and QEMU has another one"):
        await asking(WHOLE, stall=0.2).agree()
