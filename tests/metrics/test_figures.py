"""Looking at many VMs at once: each within its time, and in the order of their addresses."""

import asyncio
from contextlib import asynccontextmanager

from qmpblock.errors import ConnectError, MonitorHeldError
from qmpblock.metrics.figures import free_beside, gather


async def test_who_does_not_answer_is_told_of_in_its_place():
    tried = []

    @asynccontextmanager
    async def connect(address):
        tried.append(address)
        if address == "held":
            raise MonitorHeldError("another client has it", [42])
        if address == "mute":
            raise MonitorHeldError("it says nothing, and nobody is seen to have it")
        if address == "gone":
            raise ConnectError("nobody is there")
        await asyncio.Event().wait()
        yield

    addresses = ["gone", *(f"hangs{number}" for number in range(100)), "mute", "held", "gone"]
    found = await gather(addresses, connect, limit=0.05)
    assert [one.address for one in found] == addresses[:-1]
    assert sorted(tried) == sorted(addresses[:-1])
    assert not any(one.up for one in found)
    assert [one.address for one in found if one.held] == ["held"]
    assert (found[0].error, found[-1].error) == ("nobody is there", "another client has it")
    assert {one.error for one in found[1:-2]} == {"it has not answered within 0.05 s"}
    assert all(one.recovery_needed is None and one.disks == () for one in found)


async def test_a_defect_of_ours_is_not_a_vm_that_is_silent():
    @asynccontextmanager
    async def connect(_):
        raise ZeroDivisionError
        yield

    try:
        await gather(["a"], connect, limit=5)
    except ZeroDivisionError:
        return
    raise AssertionError


def test_what_is_free_beside_a_file(tmp_path):
    assert free_beside(str(tmp_path)) > 0
    assert free_beside(str(tmp_path / "none")) is None
