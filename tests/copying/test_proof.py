"""What is said of a proof: how far it is, what it found, and where there can be none."""

from types import SimpleNamespace

import pytest

from qmpblock.address import TCPAddress
from qmpblock.copying.hostspace import HostSpace
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.proof import _unequal, _warnings, check_provable
from qmpblock.copying.shape import Shape
from qmpblock.copying.target import NBDTarget
from qmpblock.copying.verify import Verification
from qmpblock.errors import Error, UnsupportedError
from qmpblock.ranges import Ranges

MIB = 1 << 20


def target(name, size):
    device = SimpleNamespace(name=name)
    plan = SimpleNamespace(device=device, size=size, file=f"/c/{name}", shape=Shape())
    return SimpleNamespace(plan=plan)


def test_a_difference_is_told_with_its_place_and_extent():
    found = Verification(False, (MIB, MIB), 4097, 12345, Ranges([(0, 65536)]), MIB, 1.0)
    error = _unequal(target("vd0\x1b", MIB).plan, found)
    assert "12,345 bytes differ, the first at offset 4097" in error.message
    assert "it is not kept" in error.message
    assert error.standing is None  # whoever undoes it knows
    assert "\x1b" not in error.message.replace("vd0\x1b held", "")


def test_one_of_another_size_is_told_so():
    found = Verification(False, (MIB, 2 * MIB), None, None, None, 0, 1.0)
    assert (
        "it is of 2,097,152 bytes, the disk of 1,048,576"
        in _unequal(target("vd0", MIB).plan, found).message
    )


def test_what_is_not_thin_is_warned_of():
    plan = target("vd0", MIB).plan
    assert _warnings(plan, HostSpace(Ranges(), Ranges())) == []
    [warning] = _warnings(plan, HostSpace(Ranges([(0, MIB)]), Ranges()))
    assert "not thin: 1M of zeros" in warning


def test_what_lacks_what_was_asked_for_is_not_kept():
    plan = target("vd0", MIB).plan
    plan.shape = Shape("full")
    assert _warnings(plan, HostSpace(Ranges(), Ranges())) == []
    for space in (
        HostSpace(Ranges(), Ranges([(0, 4096)])),
        HostSpace(Ranges(), Ranges(), short=4096),
    ):
        with pytest.raises(Error, match=r"4K of it have no host space, which --allocation full"):
            _warnings(plan, space)


@pytest.mark.parametrize("at", ["end", "pivot"])
async def test_a_point_that_is_over_cannot_be_compared_with(at):
    with pytest.raises(UnsupportedError, match="passes with the guest's next write") as caught:
        await check_provable(None, [], at)  # nothing is asked of the VM
    assert caught.value.exit_code == 2
    assert "--at start" in caught.value.remedy


async def test_an_export_of_a_server_is_not_asked_for_twice():
    plan = CopyPlan(
        None, "nbd://host/copy", "raw", server=NBDTarget(TCPAddress("host", 10809), "copy")
    )
    with pytest.raises(UnsupportedError, match="serves one client and ends") as caught:
        await check_provable(None, [plan], "start")
    assert "into a file" in caught.value.remedy
